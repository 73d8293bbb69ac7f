use std::io::Write;
use std::path::PathBuf;

use proto::v1;

use crate::Failure;
use crate::chat::{Chat, print_json, print_text, system};
use crate::client::Door;
use crate::request;
use crate::terminal::{self, DIM, MARK, paint};

const HELP: &str =
    "/image FILE  show a picture with the next question\n/reset       forget the conversation\n/quit        leave (also Ctrl-D)";

/// What a line of the conversation means.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Question(String),
    Image(PathBuf),
    Reset,
    Help,
    Quit,
    Nothing,
}

/// A conversation on the terminal, until the user leaves. A refused question does not end it.
pub async fn converse(flags: &Chat, door: &Door, mut pictures: Vec<v1::Part>) -> Result<(), Failure> {
    terminal::remark(&paint(DIM, format!("{} · /help lists the commands, Ctrl-D leaves", door.address)));
    let mut messages = system(flags);
    loop {
        match parse(&read_line().await?) {
            Entry::Question(text) => {
                let mut parts = std::mem::take(&mut pictures);
                parts.push(request::text(text));
                messages.push(request::message(v1::Role::User, parts));
                match answer(flags, door, &messages).await {
                    Ok(Some(text)) => messages.push(request::message(v1::Role::Assistant, vec![request::text(text)])),
                    Ok(None) => drop(messages.pop()),
                    Err(failure) => {
                        messages.pop();
                        terminal::remark(&format!("janua: {failure}"));
                    }
                }
            }
            Entry::Image(file) => match request::pictures(&[file]) {
                Ok(parts) => pictures.extend(parts),
                Err(failure) => terminal::remark(&format!("janua: {failure}")),
            },
            Entry::Reset => messages = system(flags),
            Entry::Help => terminal::remark(HELP),
            Entry::Nothing => {}
            Entry::Quit => return Ok(()),
        }
    }
}

/// Prints the answer to the last message. `None`: the user interrupted it, or it cannot be said again (JSON, several choices).
async fn answer(flags: &Chat, door: &Door, messages: &[v1::Message]) -> Result<Option<String>, Failure> {
    let input = request::chat(messages.to_vec());
    let choices = flags.sampling.n.unwrap_or(1);
    let print = async {
        let mut stream = door.generate(input, v1::OutputKind::Text, Some(flags.sampling.message()?), None).await?;
        if flags.json {
            return print_json(&mut stream).await.map(|()| None);
        }
        let text = print_text(&mut stream, choices).await?;
        // An empty message is refused by the server, so an empty answer cannot become part of the conversation.
        Ok((choices == 1 && !text.is_empty()).then_some(text))
    };
    tokio::select! {
        result = print => result,
        _ = tokio::signal::ctrl_c() => {
            terminal::remark(&paint(DIM, "\ninterrupted"));
            Ok(None)
        }
    }
}

/// One line from the terminal; Ctrl-C and the end of input read as `/quit`.
async fn read_line() -> Result<String, Failure> {
    let prompt = paint(MARK, "> ");
    let read = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        let shown = anstream::stderr().lock().write_all(prompt.as_bytes());
        shown.and_then(|()| std::io::stdin().read_line(&mut line)).map(|bytes| if bytes == 0 { "/quit".to_owned() } else { line })
    });
    tokio::select! {
        line = read => line.map_err(Failure::software)?.map_err(|error| Failure::input(format!("cannot read the terminal: {error}"))),
        _ = tokio::signal::ctrl_c() => Ok("/quit".to_owned()),
    }
}

fn parse(line: &str) -> Entry {
    let line = line.trim();
    match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
        ("", _) => Entry::Nothing,
        ("/image", file) if !file.trim().is_empty() => Entry::Image(PathBuf::from(file.trim())),
        ("/reset", "") => Entry::Reset,
        ("/quit" | "/exit", "") => Entry::Quit,
        (word, _) if word.starts_with('/') => Entry::Help,
        _ => Entry::Question(line.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_mean() {
        let rows = [
            ("why?", Entry::Question("why?".into())),
            ("  a b \n", Entry::Question("a b".into())),
            ("\n", Entry::Nothing),
            ("/image a b.png\n", Entry::Image("a b.png".into())),
            ("/image", Entry::Help),
            ("/reset", Entry::Reset),
            ("/quit\n", Entry::Quit),
            ("/what", Entry::Help),
        ];
        for (line, expected) in rows {
            assert_eq!(parse(line), expected, "{line:?}");
        }
    }
}
