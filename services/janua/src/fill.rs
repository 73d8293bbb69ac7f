use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;
use proto::v1;
use proto::v1::generate_request::Input;
use proto::v1::generate_response::Event;

use crate::Failure;
use crate::chat::{print_json, print_text};
use crate::client::{Door, Events, ServerFlags};
use crate::request::SamplingFlags;
use crate::terminal;

/// Fill the gap in a text or program, with a model that was trained to (Coder-V2-Lite base)
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  janua fill draft.py                        draft.py says <CURSOR> where the middle is missing
  janua fill --whole draft.py > done.py      the text with its gap filled
  janua fill --mark XXX < draft.py           another mark, from the standard input
  janua fill --prefix head.rs --suffix tail.rs --max-tokens 128")]
pub struct Fill {
    /// The text, with a mark where the gap is; without it, the standard input
    pub file: Option<PathBuf>,
    /// What marks the gap
    #[arg(long, value_name = "TEXT", default_value = "<CURSOR>")]
    pub mark: String,
    /// What stands before the gap, in a file of its own
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub prefix: Option<PathBuf>,
    /// What stands behind the gap, in a file of its own
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub suffix: Option<PathBuf>,
    /// Print the whole text, not only what fills the gap
    #[arg(long, conflicts_with_all = ["json", "n", "logprobs"])]
    pub whole: bool,
    /// Print every event as a line of JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    #[command(flatten)]
    pub server: ServerFlags,
}

/// Runs `janua fill`.
pub async fn run(flags: Fill) -> Result<(), Failure> {
    let (prefix, suffix) = around(&flags)?;
    let sampling = flags.sampling.message()?;
    let door = Door::open(&flags.server).await?;
    let input = Input::Fim(v1::FillInTheMiddle { prefix: prefix.clone(), suffix: suffix.clone() });
    let mut stream = door.generate(input, v1::OutputKind::Text, Some(sampling), None).await?;
    if flags.json {
        print_json(&mut stream).await?;
    } else if flags.whole {
        let middle = text(&mut stream).await?;
        terminal::answer(&format!("{prefix}{middle}{suffix}"))?;
    } else {
        print_text(&mut stream, flags.sampling.n.unwrap_or(1)).await?;
    }
    door.close().await;
    Ok(())
}

/// What stands before and behind the gap.
fn around(flags: &Fill) -> Result<(String, String), Failure> {
    if flags.prefix.is_some() || flags.suffix.is_some() {
        let part = |file: &Option<PathBuf>| file.as_deref().map_or(Ok(String::new()), read);
        return Ok((part(&flags.prefix)?, part(&flags.suffix)?));
    }
    match &flags.file {
        Some(file) => split(&read(file)?, &flags.mark, &file.display().to_string()),
        None => split(&read_stdin()?, &flags.mark, "the standard input"),
    }
}

fn split(text: &str, mark: &str, name: &str) -> Result<(String, String), Failure> {
    if mark.is_empty() {
        return Err(Failure::usage("--mark: an empty mark is everywhere"));
    }
    let missing = || Failure::usage(format!("{name} has no {mark}: put it where the middle is missing, or name another mark with --mark"));
    let (prefix, suffix) = text.split_once(mark).ok_or_else(missing)?;
    if suffix.contains(mark) {
        return Err(Failure::usage(format!("{name} has {mark} more than once: one gap is filled at a time")));
    }
    Ok((prefix.to_owned(), suffix.to_owned()))
}

fn read(file: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(file).map_err(|error| Failure::input(format!("cannot read {}: {error}", file.display())))
}

fn read_stdin() -> Result<String, Failure> {
    let mut input = std::io::stdin().lock();
    if input.is_terminal() {
        return Err(Failure::usage("no text: name a file, give --prefix and --suffix, or send it to the standard input"));
    }
    let mut text = String::new();
    input.read_to_string(&mut text).map_err(|error| Failure::input(format!("cannot read the standard input: {error}")))?;
    Ok(text)
}

/// The whole answer.
async fn text(stream: &mut Events) -> Result<String, Failure> {
    let mut text = String::new();
    while let Some(event) = stream.next().await? {
        if let Event::Text(delta) = event {
            text.push_str(&delta.text);
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_has_one_gap() {
        let whole = |text, mark| split(text, mark, "a.py").map_err(|failure| failure.to_string());
        assert_eq!(whole("a<CURSOR>b", "<CURSOR>"), Ok(("a".into(), "b".into())));
        assert_eq!(whole("<CURSOR>", "<CURSOR>"), Ok((String::new(), String::new())));
        for (text, mark, named) in [("ab", "<CURSOR>", "a.py has no <CURSOR>"), ("aXbXc", "X", "more than once"), ("a", "", "--mark")] {
            assert!(whole(text, mark).unwrap_err().contains(named), "{text:?}");
        }
    }
}
