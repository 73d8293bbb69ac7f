use std::collections::BTreeMap;
use std::io::{IsTerminal, Read};
use std::path::PathBuf;

use clap::Args;
use proto::v1;
use proto::v1::generate_response::Event;

use crate::Failure;
use crate::client::{Door, Events, ServerFlags};
use crate::events;
use crate::repl;
use crate::request::{self, SamplingFlags};
use crate::terminal::{self, DIM, MARK, paint};

/// Ask a model: one question, what stands on the standard input, or a conversation on a terminal
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua chat \"Why is the sky blue?\"
  janua chat --image cat.jpg \"What is in the picture?\"
  janua chat --model-dir ./janus-pro-1b --temperature 0     (no server needed; a conversation)
  janua chat --json-schema person.json \"Invent a person.\"
  janua chat --regex 'yes|no' --image cat.jpg \"Is this a cat?\"
  git diff | janua chat --system \"Summarise this change.\" --json")]
pub struct Chat {
    /// The question; without it, the standard input, or a conversation when that is a terminal
    pub prompt: Option<String>,
    /// A picture to show before the question; may be repeated
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// What the model is told first
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Continue the prompt as it stands, without the chat template
    #[arg(long, conflicts_with = "system")]
    pub raw: bool,
    /// Print every event as a line of JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Runs `janua chat`.
pub async fn run(flags: Chat) -> Result<(), Failure> {
    let prompt = match &flags.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if std::io::stdin().is_terminal() => None,
        None => Some(read_stdin()?),
    };
    let pictures = request::pictures(&flags.image)?;
    let door = Door::open(&flags.server).await?;
    match prompt {
        Some(prompt) => ask_once(&flags, &door, pictures, prompt).await?,
        None => repl::converse(&flags, &door, pictures).await?,
    }
    door.close().await;
    Ok(())
}

async fn ask_once(flags: &Chat, door: &Door, mut parts: Vec<v1::Part>, prompt: String) -> Result<(), Failure> {
    parts.push(request::text(prompt));
    let input = if flags.raw {
        request::completion(parts)
    } else {
        let mut messages = system(flags);
        messages.push(request::message(v1::Role::User, parts));
        request::chat(messages)
    };
    let mut stream = door.generate(input, v1::OutputKind::Text, Some(flags.sampling.message()?), None).await?;
    if flags.json { print_json(&mut stream).await } else { print_text(&mut stream, flags.sampling.n.unwrap_or(1)).await.map(drop) }
}

/// The system message, if one was given.
pub fn system(flags: &Chat) -> Vec<v1::Message> {
    flags.system.iter().map(|text| request::message(v1::Role::System, vec![request::text(text)])).collect()
}

/// Every event as a line of JSON.
pub async fn print_json(stream: &mut Events) -> Result<(), Failure> {
    while let Some(event) = stream.next().await? {
        if !terminal::json(&events::to_json(&event))? {
            return Ok(());
        }
    }
    Ok(())
}

/// The text as it comes (one choice) or choice after choice (several), then what was asked for about its tokens. Returns the first choice.
pub async fn print_text(stream: &mut Events, choices: u32) -> Result<String, Failure> {
    let mut texts: BTreeMap<u32, String> = BTreeMap::new();
    let mut tokens: Vec<v1::TokenLogprobs> = Vec::new();
    while let Some(event) = stream.next().await? {
        match event {
            Event::Text(delta) => {
                if choices == 1 && !terminal::answer(&delta.text)? {
                    return Ok(String::new());
                }
                texts.entry(delta.choice).or_default().push_str(&delta.text);
                tokens.extend(delta.logprobs);
            }
            Event::Finished(end) if choices > 1 => {
                let text = texts.get(&end.choice).map_or("", String::as_str);
                terminal::show(&format!("{} ", paint(MARK, format!("[{}]", end.choice))))?;
                terminal::answer(&format!("{text}\n"))?;
            }
            Event::Finished(end) if end.reason() == v1::FinishReason::Length && terminal::is_read_by_people() => {
                terminal::show(&paint(DIM, " …"))?;
            }
            _ => {}
        }
    }
    if choices == 1 {
        terminal::show("\n")?;
    }
    print_logprobs(&tokens)?;
    Ok(texts.remove(&0).unwrap_or_default())
}

/// One line per token: its text, its probability in per cent, and the alternatives.
fn print_logprobs(tokens: &[v1::TokenLogprobs]) -> Result<(), Failure> {
    for token in tokens {
        let Some(chosen) = &token.chosen else { continue };
        let others: Vec<String> = token.top.iter().map(entry).collect();
        terminal::line(&format!("{}  {}", entry(chosen), paint(DIM, others.join("  "))))?;
    }
    Ok(())
}

fn entry(token: &v1::Logprob) -> String {
    format!("{:?} {:.1}%", String::from_utf8_lossy(&token.bytes), f64::from(token.logprob).exp() * 100.0)
}

fn read_stdin() -> Result<String, Failure> {
    let mut text = String::new();
    std::io::stdin()
        .lock()
        .read_to_string(&mut text)
        .map_err(|error| Failure::input(format!("cannot read the standard input: {error}")))?;
    let text = text.trim_end().to_owned();
    if text.is_empty() {
        return Err(Failure::usage("no question: give it as an argument, on the standard input, or start `janua chat` on a terminal"));
    }
    Ok(text)
}
