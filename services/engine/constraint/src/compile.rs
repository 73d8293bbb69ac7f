use std::fmt::Display;
use std::thread;

use domain::{Constraint, Invalid};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use sched::GuideError;
use serde_json::{Value, json};

/// Compilers descend into what is nested, further than the stack of an ordinary thread may be long. Memory is taken as it is used.
const STACK_BYTES: usize = 64 << 20;

/// White space between the parts of a JSON document: enough for any layout, and no endless indentation.
const WHITE_SPACE: &str = r"[\x20\x0A\x0D\x09]{1,64}";

/// About the longest reason that is given for a refusal, in bytes.
const MAX_REASON: usize = 400;

/// What the library says when no token leads on.
const NOTHING: &str = "NoExtensionBias";

/// Where the library's words end and a dump of its state begins.
const STATE: [&str; 3] = ["<state>", "<backtrace>", "<non-verbose/>"];

/// What one constraint may take in the library's units. "Fuel" is about 50 000 per millisecond while compiling and 14 000 per millisecond
/// of a step, a lexer state takes 1 to 2 kB: so a mask takes some milliseconds in the worst case, and a job some 40 MB. Most constraints
/// compile in a few milliseconds; what 64 KiB of rules or properties without fuel limits can say takes seconds.
pub(crate) fn limits() -> ParserLimits {
    ParserLimits {
        max_items_in_row: 2000,
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 100_000,
        step_max_items: 50_000,
        max_lexer_states: 20_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

/// A parser at the beginning of a text.
pub(crate) fn matcher(factory: &ParserFactory, constraint: &Constraint) -> Result<Matcher, GuideError> {
    let grammar = grammar(constraint)?;
    let compile = || {
        let mut matcher = Matcher::new(factory.create_parser(grammar));
        // The first mask shows whether there is any text at all, and builds what all others need.
        match matcher.compute_mask().map_err(|error| one_line(&error)) {
            Ok(_) => Ok(matcher),
            Err(reason) if reason == NOTHING => Err("no text satisfies it".to_owned()),
            Err(reason) => Err(reason),
        }
    };
    let compiled = thread::scope(|scope| {
        let compiler = thread::Builder::new().name("janua-grammar".into()).stack_size(STACK_BYTES).spawn_scoped(scope, compile);
        compiler.map(|thread| thread.join())
    });
    match compiled {
        Err(error) => Err(GuideError::Unable(format!("no thread to compile on: {error}"))),
        Ok(Err(_)) => Err(Invalid::new(constraint.field(), "more than can be compiled").into()),
        Ok(Ok(compiled)) => compiled.map_err(|reason| Invalid::new(constraint.field(), reason).into()),
    }
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, Invalid> {
    let invalid = |reason| Invalid::new(constraint.field(), reason);
    match constraint {
        Constraint::JsonSchema(text) => Ok(TopLevelGrammar::from_json_schema(schema(text).map_err(invalid)?)),
        Constraint::Regex(text) => Ok(TopLevelGrammar::from_regex(text)),
        Constraint::Lark(text) => Ok(TopLevelGrammar::from_lark(text.clone())),
    }
}

/// A JSON schema with the library's options set to ours.
fn schema(text: &str) -> Result<Value, String> {
    let mut schema: Value = serde_json::from_str(text).map_err(|error| format!("not JSON: {}", one_line(&error)))?;
    if schema == Value::Bool(true) {
        schema = json!({});
    }
    let fields = schema.as_object_mut().ok_or("a schema is an object or true")?;
    fields.insert("x-guidance".into(), json!({ "whitespace_pattern": WHITE_SPACE }));
    Ok(schema)
}

/// What the library says, on one line: without its own state, and without the lines of the constraint that it quotes.
pub(crate) fn one_line(error: &impl Display) -> String {
    let text = format!("{error:#}");
    if text.contains("panic: ") {
        return "more than can be compiled".into();
    }
    let own = |line: &&str| !STATE.iter().any(|mark| line.starts_with(mark));
    let quoted = |line: &&str| line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).starts_with(" | ") || line.trim() == "^";
    let said: Vec<&str> = text.lines().take_while(own).filter(|line| !quoted(line)).flat_map(str::split_whitespace).collect();
    shortened(&said.join(" "))
}

/// The beginning and the end: a reason may quote much between them.
fn shortened(line: &str) -> String {
    if line.len() <= MAX_REASON {
        return line.to_owned();
    }
    let (head, tail) = (line.floor_char_boundary(MAX_REASON / 2), line.ceil_char_boundary(line.len() - MAX_REASON / 2));
    format!("{} ... {}", &line[..head], &line[tail..])
}
