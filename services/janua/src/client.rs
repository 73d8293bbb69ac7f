use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use proto::v1;
use proto::v1::generate_response::Event;
use proto::v1::janua_client::JanuaClient;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

use crate::Failure;
use crate::failure::{UNAVAILABLE, chain};
use crate::local::{Local, LocalOptions, model_name};

/// How long a connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whom to ask.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerFlags {
    /// Address of a Janua router
    #[arg(long, value_name = "URL", env = "JANUA_SERVER", default_value = "http://127.0.0.1:50051")]
    pub server: String,
    /// Load the checkpoint in this folder and answer in this process, without a server
    #[arg(long, value_name = "DIR")]
    pub model_dir: Option<PathBuf>,
    /// The VAE folder of that checkpoint, for a model that draws by a flow, when it is not the folder vae in it
    #[arg(long, value_name = "DIR", requires = "model_dir")]
    pub vae: Option<PathBuf>,
    /// Name of the model; may be left out when one model is served
    #[arg(long, short, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub model: String,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true)]
    pub timeout: Option<f64>,
}

/// The public door of a router: elsewhere, or started in this process for the occasion.
pub struct Door {
    client: JanuaClient<Channel>,
    pub address: String,
    model: String,
    timeout: Option<Duration>,
    /// Keeps the services alive as long as the door.
    local: Option<Local>,
}

impl Door {
    /// Connects as the flags say, starting the services first where they ask for it.
    pub async fn open(flags: &ServerFlags) -> Result<Self, Failure> {
        let timeout = match flags.timeout {
            Some(seconds) => {
                Some(Duration::try_from_secs_f64(seconds).map_err(|error| Failure::usage(format!("--timeout {seconds}: {error}")))?)
            }
            None => None,
        };
        let local = match &flags.model_dir {
            Some(dir) => {
                let mut options = LocalOptions::embedded(vec![(model_name(dir)?, dir.clone())])?;
                options.set_vae(flags.vae.as_deref())?;
                Some(Local::start(options).await?)
            }
            None => None,
        };
        let address = local.as_ref().map_or_else(|| flags.server.clone(), Local::address);
        let client = connect(&address).await?;
        Ok(Self { client, address, model: flags.model.clone(), timeout, local })
    }

    /// The door of services that already run in this process.
    pub async fn of(local: &Local, model: &str) -> Result<Self, Failure> {
        let address = local.address();
        Ok(Self { client: connect(&address).await?, address, model: model.to_owned(), timeout: None, local: None })
    }

    /// Sends a request and returns the stream of its events.
    pub async fn generate(
        &self,
        input: v1::generate_request::Input,
        output: v1::OutputKind,
        sampling: Option<v1::Sampling>,
        image: Option<v1::ImageSampling>,
    ) -> Result<Events, Failure> {
        let body = v1::GenerateRequest { model: self.model.clone(), input: Some(input), output: output.into(), sampling, image };
        let mut request = tonic::Request::new(body);
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        let response = self.client.clone().generate(request).await.map_err(|status| Failure::status(&status, &self.address))?;
        Ok(Events { stream: response.into_inner(), address: self.address.clone() })
    }

    /// The models behind the door.
    pub async fn models(&self) -> Result<Vec<v1::Model>, Failure> {
        let response = self.client.clone().list_models(v1::ListModelsRequest {}).await;
        Ok(response.map_err(|status| Failure::status(&status, &self.address))?.into_inner().models)
    }

    /// Stops the services that were started for this door.
    pub async fn close(self) {
        if let Some(local) = self.local {
            local.drain().await;
        }
    }
}

/// The events of one answer, in order.
pub struct Events {
    stream: Streaming<v1::GenerateResponse>,
    address: String,
}

impl Events {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Result<Option<Event>, Failure> {
        loop {
            match self.stream.message().await {
                Ok(Some(v1::GenerateResponse { event: Some(event) })) => return Ok(Some(event)),
                // An event of a newer server: nothing this program could show.
                Ok(Some(v1::GenerateResponse { event: None })) => {}
                Ok(None) => return Ok(None),
                Err(status) => return Err(Failure::status(&status, &self.address)),
            }
        }
    }
}

async fn connect(address: &str) -> Result<JanuaClient<Channel>, Failure> {
    let with_scheme = if address.contains("://") { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(with_scheme).map_err(|error| Failure::usage(format!("--server {address}: {error}")))?;
    let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.map_err(|error| {
        let reason = chain(&error);
        Failure::new(UNAVAILABLE, format!("nobody answers at {address} ({reason}); start one with `janua serve --model DIR`"))
    })?;
    let client = JanuaClient::new(channel);
    Ok(client.max_decoding_message_size(mesh::MAX_MESSAGE_BYTES).max_encoding_message_size(mesh::MAX_MESSAGE_BYTES))
}
