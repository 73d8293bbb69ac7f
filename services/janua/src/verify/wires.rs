use std::path::Path;

use proto::v1;
use proto::v1::generate_response::Event;
use serde_json::Value;

use super::drawing::NearStep;
use super::golden::{Golden, Tensor, Values};
use super::language::golden_ids;
use super::report::Report;
use super::tolerance::Tolerances;
use super::{Verify, WireName, flow, model, shards};
use crate::Failure;
use crate::broker::Broker;
use crate::client::{Door, Events};
use crate::local::{Local, LocalOptions, model_name};
use crate::request;

/// Noise for a picture that is drawn with services between and without: the reference's own noise cannot be sent through the public door.
const SEED: u64 = 7;

/// A wire between services, with the nats-server that it needs.
pub struct Transport {
    pub name: &'static str,
    broker: Option<Broker>,
}

impl Transport {
    pub async fn start(wire: WireName) -> Result<Self, Failure> {
        let (name, broker) = match wire {
            WireName::InProcess => ("in-process", None),
            WireName::Nats => ("nats", Some(Broker::start().await?)),
            WireName::Direct => ("direct", Some(Broker::start().await?)),
        };
        Ok(Self { name, broker })
    }

    /// What services are told to use it.
    pub fn settings(&self) -> Vec<(String, String)> {
        let mut settings = vec![("mesh.wire".to_owned(), self.name.to_owned())];
        settings.extend(self.broker.iter().map(|broker| ("mesh.nats_url".to_owned(), broker.url().to_owned())));
        settings
    }
}

/// Sends the golden prompts through services that talk over a wire, and compares what comes out of the public door.
pub async fn compare(flags: &Verify, transport: &Transport, golden: &Golden, report: &mut Report) -> Result<(), Failure> {
    let (dir, name) = (&flags.dir, transport.name);
    let mut settings = transport.settings();
    settings.extend(flags.shards.iter().flat_map(|&count| shards::settings(count)));
    let model = model_name(dir)?;
    let mut options = LocalOptions::with_settings(vec![(model.clone(), dir.to_owned())], &settings)?;
    options.set_vae(flags.vae.as_deref())?;
    let local = Local::start(options).await?;
    let door = Door::of(&local, &model).await?;
    for (i, entry) in golden.list("prompts").iter().enumerate() {
        let expected = golden_ids(golden, &format!("p{i}.generated_ids"), &entry["generated_ids"]);
        let found = generated(&door, dir, entry, expected.len()).await?;
        report.same(&format!("{name}: p{i}.generated_ids"), &found, &expected);
    }
    for (i, entry) in golden.list("text_to_image").iter().enumerate() {
        let (codes, levels) = drawn(&door, entry).await?;
        report.same(&format!("{name}: t2i{i}.image_ids"), &codes, &golden_ids(golden, &format!("t2i{i}.image_ids"), &entry["image_ids"]));
        compare_levels(golden, &format!("t2i{i}"), name, &levels, report);
    }
    if let Some(entry) = golden.json.get("generation") {
        let levels = flowed(&door, dir, entry).await?;
        let expected = flow::direct(dir, flags.vae.as_deref(), golden, entry, SEED).await?;
        report.levels(&format!("{name}: the picture of seed {SEED}"), &levels.data, &expected, |_| 0);
    }
    local.drain().await;
    Ok(())
}

/// The decoded file of the golden example of a flow, drawn from [`SEED`].
async fn flowed(door: &Door, dir: &Path, entry: &Value) -> Result<pixels::Rgb, Failure> {
    let sampling = v1::ImageSampling {
        guidance: entry.get("cfg_weight").and_then(Value::as_f64).map(|weight| weight as f32),
        steps: entry.get("num_inference_steps").and_then(Value::as_u64).map(|steps| steps as u32),
        seed: Some(SEED),
        ..v1::ImageSampling::default()
    };
    let mut stream = door.generate(input(dir, entry)?, v1::OutputKind::Image, None, Some(sampling)).await?;
    let image = last_image(&mut stream).await?;
    pixels::decode(&image.data, &pixels::Limits::default()).map_err(Failure::software)
}

/// Token ids of the greedy continuation of a golden prompt.
async fn generated(door: &Door, dir: &Path, entry: &Value, tokens: usize) -> Result<Vec<u32>, Failure> {
    let sampling = v1::Sampling { temperature: Some(0.0), max_tokens: Some(tokens as u32), ignore_eos: true, ..v1::Sampling::default() };
    let mut stream = door.generate(input(dir, entry)?, v1::OutputKind::Text, Some(sampling), None).await?;
    let mut ids = Vec::new();
    while let Some(event) = stream.next().await? {
        if let Event::Text(delta) = event {
            ids.extend(delta.token_ids);
        }
    }
    Ok(ids)
}

/// Codes and decoded file of a golden drawing.
async fn drawn(door: &Door, entry: &Value) -> Result<(Vec<u32>, pixels::Rgb), Failure> {
    let text = entry["text"].as_str().unwrap_or_default();
    let sampling = v1::ImageSampling {
        temperature: Some(0.0),
        guidance: entry.get("cfg_weight").and_then(Value::as_f64).map(|weight| weight as f32),
        ..v1::ImageSampling::default()
    };
    let input = request::completion(vec![request::text(text)]);
    let mut stream = door.generate(input, v1::OutputKind::Image, None, Some(sampling)).await?;
    let image = last_image(&mut stream).await?;
    let picture = pixels::decode(&image.data, &pixels::Limits::default()).map_err(Failure::software)?;
    Ok((image.codes, picture))
}

async fn last_image(stream: &mut Events) -> Result<v1::GeneratedImage, Failure> {
    let mut image = None;
    while let Some(event) = stream.next().await? {
        if let Event::Image(finished) = event {
            image = Some(finished);
        }
    }
    image.ok_or_else(|| Failure::software("the answer holds no picture"))
}

fn compare_levels(golden: &Golden, prompt: &str, wire: &str, picture: &pixels::Rgb, report: &mut Report) {
    let tolerance = Tolerances::of(&golden.json).get(&format!("{prompt}.pixels"));
    let size = (picture.height as usize, picture.width as usize);
    let near = NearStep::of(golden.tensor(&format!("{prompt}.pixels")), tolerance, size);
    let key = format!("{prompt}.pixels_u8");
    if let Some(Tensor { values: Values::U8(expected), .. }) = golden.tensor(&key) {
        report.levels(&format!("{wire}: {key}"), &picture.data, expected, |i| near.levels(i));
    }
}

/// A golden prompt as a client would write it.
fn input(dir: &Path, entry: &Value) -> Result<v1::generate_request::Input, Failure> {
    Ok(match model::input(dir, entry)? {
        domain::Input::Chat(messages) => v1::generate_request::Input::Chat(wire::input::to_conversation(&messages)),
        domain::Input::Completion { parts, .. } => request::completion(wire::input::to_parts(&parts)),
        domain::Input::Fim { prefix, suffix } => v1::generate_request::Input::Fim(v1::FillInTheMiddle { prefix, suffix }),
    })
}
