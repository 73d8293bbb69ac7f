use std::sync::LazyLock;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator};
use opentelemetry::trace::TraceContextExt;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::{Span, field};
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// W3C `traceparent` and `tracestate`.
static PROPAGATOR: LazyLock<TraceContextPropagator> = LazyLock::new(TraceContextPropagator::new);

/// Writes the context of the current span into the headers of an outgoing call.
pub fn inject(headers: &mut HeaderMap) {
    PROPAGATOR.inject_context(&Span::current().context(), &mut HeadersMut(headers));
}

/// The W3C context of a span as one line, for messages that have no headers of their own; `None` for a span that nobody records.
pub fn traceparent(span: &Span) -> Option<String> {
    if span.is_disabled() {
        return None;
    }
    let mut headers = HeaderMap::new();
    PROPAGATOR.inject_context(&span.context(), &mut HeadersMut(&mut headers));
    headers.get("traceparent")?.to_str().ok().map(str::to_owned)
}

/// The span of an incoming call, child of the caller's span named in `headers`.
///
/// `service` is the gRPC service (`janua.v1.Tokenizer`) or the plain name (`tokenizer`). Calls of gRPC's own services (health,
/// reflection) get a disabled span: probes would bury the requests.
pub fn server_span(headers: &HeaderMap, service: &str, method: &str) -> Span {
    if service.starts_with("grpc.") {
        return Span::none();
    }
    let owner = owner(service);
    let span = tracing::info_span!(
        parent: None,
        "call",
        otel.name = format_args!("{owner}/{method}"),
        otel.kind = "server",
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
        janua.service = owner,
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        rpc.grpc.status_code = field::Empty,
    );
    let remote = PROPAGATOR.extract(&Headers(headers));
    if remote.span().span_context().is_valid() {
        // Fails only when no OpenTelemetry layer is installed, and then there is nothing to link.
        let _ = span.set_parent(remote);
    }
    span
}

/// The span of an outgoing call to `target` (as `tokenizer.tiny`), child of the current span.
pub fn client_span(target: &str, method: &str) -> Span {
    tracing::info_span!(
        "send",
        otel.name = format_args!("{target}/{method}"),
        otel.kind = "client",
        otel.status_code = field::Empty,
        otel.status_description = field::Empty,
        rpc.system = "grpc",
        rpc.method = method,
        rpc.grpc.status_code = field::Empty,
        server.address = target,
    )
}

/// Notes how a call ended on its span: `code` is the gRPC status code, `message` its text.
pub fn record_status(span: &Span, code: i32, message: &str) {
    span.record("rpc.grpc.status_code", code);
    if code != 0 {
        span.record("otel.status_code", "ERROR");
        span.record("otel.status_description", message);
    }
}

/// Which part of Janua answers for a gRPC service: `janua.v1.Tokenizer` -> `tokenizer`; the public service belongs to the router.
fn owner(service: &str) -> String {
    let name = service.rsplit('.').next().unwrap_or(service).to_ascii_lowercase();
    if name == "janua" { "router".to_owned() } else { name }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        // The propagator writes an empty `tracestate` when there is none: not worth a header.
        if value.is_empty() {
            return;
        }
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(key), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn a_service_has_one_owner() {
        for (service, expected) in [("janua.v1.Tokenizer", "tokenizer"), ("janua.v1.Janua", "router"), ("vision", "vision"), ("", "")] {
            assert_eq!(owner(service), expected);
        }
    }
}
