//! One TOML file, overridden by the environment and by flags; what is wrong is named with the place it came from.
//!
//! Precedence: `--set section.key=value`, then `JANUA_<SECTION>_<KEY>`, then the file, then the default of the section's struct.
//! Every section is a flat table that its owner reads once with [`Config::section`]; models are listed as `[[models]]`.

mod de;
mod error;
mod models;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::{Table, Value};

pub use error::{ConfigError, Origin};
pub use models::ModelConfig;

/// Every section there is. A process reads those of its services; a misspelt name is refused by all.
pub const SECTIONS: [&str; 10] =
    ["process", "telemetry", "mesh", "cache", "router", "tokenizer", "vision", "language", "experts", "images"];

/// Environment variables that carry settings start with this.
const PREFIX: &str = "JANUA_";

/// Settings of a process, each with its origin.
#[derive(Debug, Clone, Default)]
pub struct Config {
    sections: BTreeMap<String, Section>,
    models: Vec<ModelConfig>,
}

/// Keys of one section, last writer wins.
type Section = BTreeMap<String, Setting>;

#[derive(Debug, Clone)]
pub(crate) struct Setting {
    pub(crate) value: Raw,
    pub(crate) origin: Origin,
}

/// A value with its type (from the file), or text that the reader's type decides about (environment, flags).
#[derive(Debug, Clone)]
pub(crate) enum Raw {
    Typed(Value),
    Text(String),
}

impl Config {
    /// Reads `file`, then this process's environment, then `overrides` (`section.key`, value).
    pub fn load(file: Option<&Path>, overrides: &[(String, String)]) -> Result<Self, ConfigError> {
        let text = match file {
            Some(path) => {
                Some((path, std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?))
            }
            None => None,
        };
        // A name or value that is not UTF-8 cannot be a setting of ours.
        let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::resolve(text.as_ref().map(|(path, text)| (*path, text.as_str())), environment, overrides)
    }

    /// [`Config::load`] with the file's text and the environment given.
    pub fn resolve(
        file: Option<(&Path, &str)>,
        environment: impl IntoIterator<Item = (String, String)>,
        overrides: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        if let Some((path, text)) = file {
            config.read_file(path, text)?;
        }
        for (name, value) in environment {
            config.read_variable(&name, value)?;
        }
        for (key, value) in overrides {
            config.read_flag(key, value)?;
        }
        Ok(config)
    }

    /// The section `name` as its owner's struct; a section that is nowhere set gives the struct's defaults.
    pub fn section<T: DeserializeOwned>(&self, name: &str) -> Result<T, ConfigError> {
        debug_assert!(SECTIONS.contains(&name), "{name} is missing in SECTIONS");
        static EMPTY: Section = Section::new();
        de::section(name, self.sections.get(name).unwrap_or(&EMPTY))
    }

    /// The same settings with one changed, as `--set` would change it.
    pub fn with(mut self, key: &str, value: &str) -> Result<Self, ConfigError> {
        self.read_flag(key, value)?;
        Ok(self)
    }

    /// The models to serve, in the order in which they were named.
    pub fn models(&self) -> Vec<ModelConfig> {
        self.models.clone()
    }

    /// The VAE folder that was named for a model.
    pub fn vae(&self, model: &str) -> Option<PathBuf> {
        self.models.iter().find(|known| known.name == model)?.vae.clone()
    }

    /// Adds the model of a `--model` flag, `NAME=PATH` or a path alone, whose last part is then the name. A model of the same name gets the
    /// new path.
    pub fn add_model(&mut self, flag: &str) -> Result<(), ConfigError> {
        let origin = Origin::Flag("--model".to_owned());
        let model = match Path::new(flag).file_name().and_then(OsStr::to_str) {
            Some(folder) if !flag.contains('=') => ModelConfig::parse(&format!("{folder}={flag}"), &origin)?,
            _ => ModelConfig::parse(flag, &origin)?,
        };
        match self.models.iter_mut().find(|known| known.name == model.name) {
            Some(known) => *known = model,
            None => self.models.push(model),
        }
        Ok(())
    }

    /// Sets the VAE folder of a `--vae` flag: `NAME=PATH` for the model of that name, a path alone for the only model.
    pub fn add_vae(&mut self, flag: &str) -> Result<(), ConfigError> {
        let origin = Origin::Flag("--vae".to_owned());
        let refuse = |reason: String| Err(ConfigError::key("models", "vae", &origin, reason));
        let (model, path) = match (flag.split_once('='), self.models.as_mut_slice()) {
            (Some((name, path)), models) => match models.iter_mut().find(|model| model.name == name) {
                Some(model) => (model, path),
                None => return refuse(format!("there is no model {name}")),
            },
            (None, [model]) => (model, flag),
            (None, models) => return refuse(format!("{} models: which one is meant? NAME=PATH says so", models.len())),
        };
        if path.is_empty() {
            return refuse("the path is empty".to_owned());
        }
        model.vae = Some(PathBuf::from(path));
        Ok(())
    }

    fn read_file(&mut self, path: &Path, text: &str) -> Result<(), ConfigError> {
        let origin = Origin::File(path.to_owned());
        let table: Table = text.parse().map_err(|source: toml::de::Error| ConfigError::syntax(path, text, &source))?;
        for (section, value) in table {
            match value {
                Value::Array(entries) if section == "models" => self.models = models::from_file(entries, &origin)?,
                _ if section == "models" => {
                    return Err(ConfigError::key("models", "", &origin, "a list of tables is expected: [[models]]"));
                }
                Value::Table(keys) => {
                    for (key, value) in keys {
                        self.set(&section, key, Raw::Typed(value), origin.clone())?;
                    }
                    self.known(&section, &origin)?;
                }
                _ => {
                    self.known(&section, &origin)?;
                    return Err(ConfigError::key(&section, "", &origin, "a table is expected"));
                }
            }
        }
        Ok(())
    }

    fn read_variable(&mut self, name: &str, value: String) -> Result<(), ConfigError> {
        let Some(rest) = name.strip_prefix(PREFIX) else { return Ok(()) };
        let origin = Origin::Variable(name.to_owned());
        if rest == "MODELS" {
            self.models = models::from_list(&value, &origin)?;
            return Ok(());
        }
        match rest.to_ascii_lowercase().split_once('_') {
            Some((section, key)) if !is_service_link(key) => self.set(section, key.to_owned(), Raw::Text(value), origin),
            _ => Ok(()),
        }
    }

    fn read_flag(&mut self, key: &str, value: &str) -> Result<(), ConfigError> {
        let origin = Origin::Flag(format!("--set {key}"));
        match key.split_once('.') {
            Some((section, key)) => self.set(section, key.to_owned(), Raw::Text(value.to_owned()), origin),
            None => Err(ConfigError::key(key, "", &origin, "a setting is named section.key")),
        }
    }

    fn set(&mut self, section: &str, key: String, value: Raw, origin: Origin) -> Result<(), ConfigError> {
        self.known(section, &origin)?;
        self.sections.entry(section.to_owned()).or_default().insert(key, Setting { value, origin });
        Ok(())
    }

    fn known(&self, section: &str, origin: &Origin) -> Result<(), ConfigError> {
        if SECTIONS.contains(&section) {
            return Ok(());
        }
        let known = SECTIONS.iter().copied().chain(["models"]);
        Err(ConfigError::UnknownSection { section: section.to_owned(), origin: origin.clone(), hint: error::hint(section, known) })
    }
}

/// Kubernetes tells every pod about the services beside it: `JANUA_ROUTER_SERVICE_HOST`, `JANUA_ROUTER_PORT_50051_TCP`, ... These are no settings.
fn is_service_link(key: &str) -> bool {
    key == "port" || key.starts_with("port_") || key.starts_with("service_host") || key.starts_with("service_port")
}

/// Where the configuration is looked for when nobody says: `janua.toml` in the working directory, if there is one.
pub fn default_file() -> Option<PathBuf> {
    let path = PathBuf::from("janua.toml");
    path.is_file().then_some(path)
}
