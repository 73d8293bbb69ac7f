use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic_health::pb::health_server::HealthServer;
use tower::Service;

use crate::error::MeshError;
use crate::health::HealthService;

/// The gRPC services offered under one target: any tonic servers, with health and reflection beside them.
///
/// A plain map from service name to server instead of an HTTP router: gRPC paths have exactly one shape
/// (`/package.Service/Method`), and the in-process wire is judged in microseconds.
#[derive(Clone)]
pub struct Routes {
    servers: HashMap<&'static str, Arc<dyn Server>>,
    descriptors: Vec<&'static [u8]>,
    serving: Arc<watch::Sender<bool>>,
}

impl Default for Routes {
    fn default() -> Self {
        Self::new()
    }
}

impl Routes {
    /// No service yet; servable from the start unless [`set_serving`](Self::set_serving) says otherwise.
    pub fn new() -> Self {
        Self { servers: HashMap::new(), descriptors: Vec::new(), serving: Arc::new(watch::Sender::new(true)) }
    }

    /// Adds a generated tonic server. A second one of the same gRPC service replaces the first.
    pub fn service<S>(mut self, server: S) -> Self
    where
        S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
        S: NamedService + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
    {
        self.servers.insert(S::NAME, Arc::new(server));
        self
    }

    /// Adds an encoded `FileDescriptorSet` to what reflection shows.
    pub fn reflection(mut self, descriptors: &'static [u8]) -> Self {
        self.descriptors.push(descriptors);
        self
    }

    /// What `grpc.health.v1` answers for every service here, in all clones of these routes: SERVING or NOT_SERVING.
    pub fn set_serving(&self, serving: bool) {
        // Watchers are told of changes only.
        self.serving.send_if_modified(|now| std::mem::replace(now, serving) != serving);
    }

    /// Completes the map with health and reflection.
    pub(crate) fn table(&self) -> Result<Table, MeshError> {
        let names: Vec<String> = self.servers.keys().map(|name| (*name).to_owned()).collect();
        let health = HealthService { serving: self.serving.subscribe(), services: names.clone().into() };
        let mut all = self.clone().service(HealthServer::new(health));
        for version in [Reflection::V1, Reflection::V1Alpha] {
            all = version.add(all, &names)?;
        }
        Ok(Table { servers: all.servers, routes: self.clone() })
    }

    /// The gRPC services added so far, without health and reflection.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.servers.keys().copied().collect()
    }
}

/// [`Routes`] with health and reflection: what a wire hands its calls to.
pub(crate) struct Table {
    servers: HashMap<&'static str, Arc<dyn Server>>,
    pub routes: Routes,
}

impl Table {
    /// The server for `/package.Service/Method`, and the two names; `None` if the service is not here or the path has another shape.
    pub(crate) fn find<'p>(&self, path: &'p str) -> Option<(&Arc<dyn Server>, &'p str, &'p str)> {
        let (service, method) = split_path(path)?;
        Some((self.servers.get(service)?, service, method))
    }
}

/// `/package.Service/Method` in its two halves.
pub(crate) fn split_path(path: &str) -> Option<(&str, &str)> {
    path.strip_prefix('/')?.split_once('/')
}

/// A tonic server with its type forgotten.
pub(crate) trait Server: Send + Sync {
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>>;
}

impl<S> Server for S
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send + 'static,
{
    fn call(&self, request: http::Request<Body>) -> BoxFuture<'static, http::Response<Body>> {
        // Generated servers are always ready: `poll_ready` has nothing to wait for.
        Service::call(&mut self.clone(), request).map(|answer| answer.unwrap_or_else(|never| match never {})).boxed()
    }
}

#[derive(Clone, Copy)]
enum Reflection {
    V1,
    V1Alpha,
}

impl Reflection {
    fn add(self, routes: Routes, names: &[String]) -> Result<Routes, MeshError> {
        let mut builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health")
            .with_service_name(match self {
                Self::V1 => "grpc.reflection.v1.ServerReflection",
                Self::V1Alpha => "grpc.reflection.v1alpha.ServerReflection",
            });
        for descriptors in &routes.descriptors {
            builder = builder.register_encoded_file_descriptor_set(descriptors);
        }
        for name in names {
            builder = builder.with_service_name(name);
        }
        Ok(match self {
            Self::V1 => routes.service(builder.build_v1()?),
            Self::V1Alpha => routes.service(builder.build_v1alpha()?),
        })
    }
}
