use std::path::PathBuf;

use serde::Deserialize;
use toml::Value;

use crate::{ConfigError, Origin};

/// Longest name of a model.
const MAX_NAME: usize = 64;

/// One `[[models]]` entry: a name for clients and the folder of the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    pub name: String,
    /// Taken from the working directory when relative.
    pub path: PathBuf,
    /// Folder of the VAE, for a model that draws by a flow; without it the folder `vae` in `path`.
    #[serde(default)]
    pub vae: Option<PathBuf>,
}

impl ModelConfig {
    /// `NAME=PATH`.
    pub(crate) fn parse(text: &str, origin: &Origin) -> Result<Self, ConfigError> {
        let (name, path) =
            text.split_once('=').ok_or_else(|| ConfigError::key("models", "", origin, format!("{text:?} is not NAME=PATH")))?;
        Self { name: name.to_owned(), path: PathBuf::from(path), vae: None }.checked(origin)
    }

    fn checked(self, origin: &Origin) -> Result<Self, ConfigError> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if self.name.is_empty() || self.name.len() > MAX_NAME || !self.name.chars().all(legal) {
            let reason = format!("{:?} is not a name of 1 to {MAX_NAME} letters, digits, '.', '_' and '-'", self.name);
            return Err(ConfigError::key("models", "name", origin, reason));
        }
        if self.path.as_os_str().is_empty() {
            return Err(ConfigError::key("models", "path", origin, format!("the path of model {} is empty", self.name)));
        }
        if self.vae.as_ref().is_some_and(|vae| vae.as_os_str().is_empty()) {
            return Err(ConfigError::key("models", "vae", origin, format!("the VAE folder of model {} is empty", self.name)));
        }
        Ok(self)
    }
}

/// `[[models]]` of a file.
pub(crate) fn from_file(entries: Vec<Value>, origin: &Origin) -> Result<Vec<ModelConfig>, ConfigError> {
    let entry = |(i, value): (usize, Value)| {
        let model: ModelConfig =
            value.try_into().map_err(|error: toml::de::Error| ConfigError::key(&format!("models[{i}]"), "", origin, error.message()))?;
        model.checked(origin)
    };
    distinct(entries.into_iter().enumerate().map(entry).collect::<Result<_, _>>()?, origin)
}

/// `NAME=PATH,NAME=PATH` of the variable `JANUA_MODELS`.
pub(crate) fn from_list(list: &str, origin: &Origin) -> Result<Vec<ModelConfig>, ConfigError> {
    let models = list.split(',').filter(|entry| !entry.is_empty()).map(|entry| ModelConfig::parse(entry, origin));
    distinct(models.collect::<Result<_, _>>()?, origin)
}

fn distinct(models: Vec<ModelConfig>, origin: &Origin) -> Result<Vec<ModelConfig>, ConfigError> {
    for (i, model) in models.iter().enumerate() {
        if models[..i].iter().any(|earlier| earlier.name == model.name) {
            return Err(ConfigError::key("models", "name", origin, format!("{} is named twice", model.name)));
        }
    }
    Ok(models)
}
