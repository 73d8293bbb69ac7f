use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::Failure;

pub const DIM: Style = Style::new().dimmed();
pub const BOLD: Style = Style::new().bold();
pub const GOOD: Style = AnsiColor::Green.on_default();
pub const BAD: Style = AnsiColor::Red.on_default().bold();
pub const MARK: Style = AnsiColor::Cyan.on_default();

/// `text` in `style`. Written through `anstream`, which drops the style where it does not belong (no terminal, `NO_COLOR`).
pub fn paint(style: Style, text: impl std::fmt::Display) -> String {
    format!("{style}{text}{style:#}")
}

/// Writes to the standard output at once. `Ok(false)`: the reader has gone away and nothing more needs to be written.
pub fn show(text: &str) -> Result<bool, Failure> {
    let mut out = anstream::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) => Failure::output(&error).map_or(Ok(false), Err),
    }
}

/// Writes text of a model: as it is where a program reads it, with its control characters made visible where a terminal would obey them.
pub fn answer(text: &str) -> Result<bool, Failure> {
    let mut out = io::stdout().lock();
    let shown = if out.is_terminal() { harmless(text) } else { Cow::Borrowed(text) };
    match out.write_all(shown.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) => Failure::output(&error).map_or(Ok(false), Err),
    }
}

/// Whether a person reads the standard output.
pub fn is_read_by_people() -> bool {
    io::stdout().is_terminal()
}

/// Control characters other than line break and tab become their pictures (escape: U+241B).
fn harmless(text: &str) -> Cow<'_, str> {
    let commands = |c: char| c.is_control() && c != '\n' && c != '\t';
    let picture = |c: char| match u32::from(c) {
        code @ 0..0x20 => char::from_u32(0x2400 + code).unwrap_or('\u{FFFD}'),
        _ => '\u{FFFD}',
    };
    if !text.contains(commands) {
        return Cow::Borrowed(text);
    }
    text.chars().map(|c| if commands(c) { picture(c) } else { c }).collect()
}

/// As [`show`], with a line break.
pub fn line(text: &str) -> Result<bool, Failure> {
    show(&format!("{text}\n"))
}

/// One JSON value on a line of its own.
pub fn json(value: &Value) -> Result<bool, Failure> {
    line(&value.to_string())
}

/// A remark on stderr that is not part of the answer.
pub fn remark(text: &str) {
    // Nobody is left to tell when stderr is closed.
    let _ = writeln!(anstream::stderr().lock(), "{text}");
}

/// A bar on stderr; hidden when stderr is no terminal.
pub fn bar(length: u64, label: &str) -> ProgressBar {
    let target = if io::stderr().is_terminal() { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(length), target);
    let template = ProgressStyle::with_template("{msg} {bar:32} {pos}/{len} {eta}");
    bar.set_style(template.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─"));
    bar.set_message(label.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::harmless;

    #[test]
    fn a_model_does_not_command_the_terminal() {
        for (text, expected) in
            [("a\tb\n", "a\tb\n"), ("\x1b[2Jx", "␛[2Jx"), ("a\rb", "a␍b"), ("\u{9b}1m\x7f", "\u{FFFD}1m\u{FFFD}"), ("语", "语")]
        {
            assert_eq!(harmless(text), expected);
        }
    }
}
