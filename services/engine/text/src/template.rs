use std::path::Path;

use checkpoint::read_json;
use domain::{Invalid, Message, Part, Role};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value, context};
use serde_json::Value as Json;

use crate::TextError;
use crate::error::one_line;
use crate::tokens::Tokens;

const NAME: &str = "chat";

/// No template comes near: the longest published ones have some ten thousand characters.
const LARGEST: u64 = 1 << 20; // bytes

/// The chat template of a checkpoint.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    form: ContentForm,
    bos: String,
    eos: String,
    pad: String,
}

/// How a template wants a message that is only text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ContentForm {
    String,
    Parts,
}

impl ChatTemplate {
    /// Finds the template of the folder `dir`: a file of its own, else an entry of `tokenizer_config.json`. `None` when there is none.
    pub fn find(dir: &Path, tokenizer_config: &Json, tokens: &Tokens) -> Result<Option<Self>, TextError> {
        let Some((file, source)) = source(dir, tokenizer_config)? else { return Ok(None) };
        let environment =
            compile(source).map_err(|error| TextError::file(&dir.join(file), format!("chat_template: {}", one_line(&error))))?;
        let text = |token: Option<&crate::tokens::Token>| token.map_or(String::new(), |token| token.text.clone());
        let (bos, eos) = (text(tokens.bos.as_ref()), text(Some(&tokens.eos)));
        let mut template = Self { environment, form: ContentForm::String, bos, eos, pad: tokens.template_pad.clone() };
        template.form = template.detect_form();
        Ok(Some(template))
    }

    /// Renders a conversation. `content` is applied to every text that a client wrote.
    pub fn render(&self, messages: &[Message], reply: bool, content: &dyn Fn(&str) -> String) -> Result<String, TextError> {
        let messages: Vec<Value> = messages.iter().map(|message| self.message(message, content)).collect();
        self.render_values(messages, reply).map_err(|error| match raised(&error) {
            Some(reason) => Invalid::new("chat.messages", reason).into(),
            None => TextError::Template(one_line(&error)),
        })
    }

    fn render_values(&self, messages: Vec<Value>, reply: bool) -> Result<String, Error> {
        self.environment.get_template(NAME)?.render(context! {
            messages => messages,
            add_generation_prompt => reply,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
            pad_token => self.pad.as_str(),
        })
    }

    fn message(&self, message: &Message, content: &dyn Fn(&str) -> String) -> Value {
        let text = |part: &Part| match part {
            Part::Text(text) => Some(content(text)),
            Part::Image(_) => None,
        };
        let all_text = || message.parts.iter().map(text).collect::<Option<String>>();
        let whole = if self.form == ContentForm::String { all_text() } else { None };
        let content = whole.map(Value::from).unwrap_or_else(|| {
            let part = |part| text(part).map_or_else(|| context! { type => "image" }, |text| context! { type => "text", text => text });
            message.parts.iter().map(part).collect()
        });
        context! { role => role(message.role), content => content }
    }

    /// Strings, unless the template only shows text that is in a list of parts: such a template walks over the content.
    fn detect_form(&self) -> ContentForm {
        const PROBE: &str = "probe of the content form";
        let shows = |content: Value| {
            let message = context! { role => "user", content => content };
            self.render_values(vec![message], true).is_ok_and(|text| text.contains(PROBE))
        };
        let parts = || Value::from(vec![context! { type => "text", text => PROBE }]);
        if !shows(Value::from(PROBE)) && shows(parts()) { ContentForm::Parts } else { ContentForm::String }
    }
}

fn role(role: Role) -> &'static str {
    match role {
        Role::System => "system",
        Role::User => "user",
        Role::Assistant => "assistant",
    }
}

/// The template's text and the file that it is from.
fn source(dir: &Path, tokenizer_config: &Json) -> Result<Option<(&'static str, String)>, TextError> {
    const FILE: &str = "chat_template.jinja";
    const JSON: &str = "chat_template.json";
    const CONFIG: &str = "tokenizer_config.json";
    if let Some(text) = read_text(&dir.join(FILE))? {
        return Ok(Some((FILE, text)));
    }
    let of_json = read_json(&dir.join(JSON))?;
    let (file, value) = match of_json.as_ref().and_then(|json| json.get("chat_template")) {
        Some(value) => (JSON, Some(value)),
        None => (CONFIG, tokenizer_config.get("chat_template")),
    };
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    match default_of(value) {
        Some(text) => Ok(Some((file, text.to_owned()))),
        None => {
            Err(TextError::file(&dir.join(file), "field chat_template: a string, or a list of named templates with a default, expected"))
        }
    }
}

/// One template, or the default of a list of `{"name", "template"}`.
fn default_of(value: &Json) -> Option<&str> {
    let Some(list) = value.as_array() else { return value.as_str() };
    let default = list.iter().find(|entry| entry.get("name").is_some_and(|name| name == "default"));
    let only = if list.len() == 1 { list.first() } else { None };
    default.or(only)?.get("template")?.as_str()
}

fn read_text(path: &Path) -> Result<Option<String>, TextError> {
    let wrong = |error: std::io::Error| TextError::file(path, one_line(&error));
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(error)),
        Ok(metadata) if metadata.len() > LARGEST => return Err(TextError::file(path, format!("larger than {LARGEST} bytes"))),
        Ok(_) => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(wrong)
}

/// The environment in which the reference library renders templates: Jinja with trimmed blocks, Python's string methods and
/// `raise_exception`.
fn compile(source: String) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |reason: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raised by the template").with_source(Raised(reason)))
    });
    environment.add_template_owned(NAME, source)?;
    Ok(environment)
}

/// What a template says when it refuses a conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raised(error: &Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if let Some(raised) = error.downcast_ref::<Raised>() {
            return Some(one_line(raised));
        }
        source = error.source();
    }
    None
}
