//! The spans of a generation. Apart from the other tests: a process has one tracing subscriber.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::{Arc, Mutex};

use support::{llama, serve};
use tracing::field::Field;
use tracing_subscriber::layer::{Context, SubscriberExt};

#[tokio::test]
async fn a_generation_leaves_its_spans() {
    let spans = Spans::default();
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(spans.clone())).unwrap();
    let service = serve("llama").await;
    service.ids(&llama(0).0).await;
    let seen = spans.seen();
    let lines = [
        "language.generate < call",
        "language.prefill < language.generate",
        "language.decode < language.generate",
        "janua.prompt_tokens=13",
        "janua.output_tokens=13",
        "janua.outcome=length",
    ];
    for line in lines {
        assert!(seen.iter().any(|seen| seen == line), "{line} is not in {seen:?}");
    }
}

/// Collects spans as `name` or `name < parent`, and fields recorded later as `field=value`.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<String>>>);

impl Spans {
    fn seen(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl<S> tracing_subscriber::Layer<S> for Spans
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    fn on_new_span(&self, attributes: &tracing::span::Attributes<'_>, id: &tracing::Id, context: Context<'_, S>) {
        let parent = context.span(id).and_then(|span| span.parent()).map_or(String::new(), |parent| format!(" < {}", parent.name()));
        self.0.lock().unwrap().push(format!("{}{parent}", attributes.metadata().name()));
    }

    fn on_record(&self, _id: &tracing::Id, values: &tracing::span::Record<'_>, _context: Context<'_, S>) {
        values.record(&mut |field: &Field, value: &dyn std::fmt::Debug| {
            self.0.lock().unwrap().push(format!("{}={}", field.name(), format!("{value:?}").trim_matches('"')));
        });
    }
}
