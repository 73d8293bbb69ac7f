use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::TextError;

/// The special tokens that requests need, by role. Ids are found by string.
#[derive(Debug)]
pub(crate) struct Tokens {
    pub bos: Option<Token>,
    pub eos: Token,
    /// Stands for a picture in rendered text.
    pub image: Option<Token>,
    /// Around a picture, in families that have them.
    pub begin_image: Option<Token>,
    pub end_image: Option<Token>,
    /// Fills the unconditional half of a guidance pair.
    pub pad: Option<Token>,
    /// `pad_token` of the configuration, for templates.
    pub template_pad: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub text: String,
    pub id: u32,
}

/// The strings of the Janus and DeepSeek-VL tokenizers, where the configuration names no others.
const IMAGE: &str = "<image_placeholder>";
const BEGIN_IMAGE: &str = "<begin_of_image>";
const END_IMAGE: &str = "<end_of_image>";
const PAD: &str = "<｜▁pad▁｜>";

impl Tokens {
    /// Looks up every token that `tokenizer_config.json` (`config`, lying at `path`) names.
    pub fn find(tokenizer: &Tokenizer, config: &Value, path: &Path) -> Result<Self, TextError> {
        let lookup = |text: &str| tokenizer.token_to_id(text).map(|id| Token { text: text.to_owned(), id });
        let named = |key: &str| {
            let Some(text) = content(config, key) else { return Ok(None) };
            let need = format!("is the {key} of tokenizer_config.json");
            lookup(text).map(Some).ok_or_else(|| missing(path, text, &need))
        };
        let or_default = |key: &str, default: &str| Ok::<_, TextError>(named(key)?.or_else(|| lookup(default)));
        Ok(Self {
            bos: named("bos_token")?,
            eos: named("eos_token")?.ok_or_else(|| TextError::file(path, "field eos_token: missing"))?,
            image: or_default("image_token", IMAGE)?,
            begin_image: or_default("boi_token", BEGIN_IMAGE)?,
            end_image: or_default("eoi_token", END_IMAGE)?,
            pad: lookup(PAD),
            template_pad: content(config, "pad_token").unwrap_or_default().to_owned(),
        })
    }

    /// Refuses a tokenizer that lacks what a family of models cannot do without. `draws` tells whether a model of a family that may draw does.
    pub fn require(&self, model_type: &str, draws: bool, path: &Path) -> Result<(), TextError> {
        let (sees, draws) = match model_type {
            "janus" | "multi_modality" => (true, draws),
            "deepseek_vl" | "deepseek_vl_hybrid" => (true, false),
            _ => (false, false),
        };
        let need = format!("a {model_type} model needs");
        for (needed, token, text) in [
            (sees, &self.image, IMAGE),
            (draws, &self.begin_image, BEGIN_IMAGE),
            (draws, &self.end_image, END_IMAGE),
            (draws, &self.pad, PAD),
        ] {
            if needed && token.is_none() {
                return Err(missing(path, text, &need));
            }
        }
        Ok(())
    }
}

fn missing(path: &Path, token: &str, need: &str) -> TextError {
    TextError::MissingToken { path: path.with_file_name("tokenizer.json"), token: token.to_owned(), need: need.to_owned() }
}

/// A token is written as a string or as an object with its `content`; null means that there is none.
fn content<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    let value = config.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}
