use std::path::PathBuf;
use std::sync::Arc;

use config::{Config, ConfigError};

use crate::{Bars, Progress, Silent};

/// Flags that every service takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    /// Settings as a TOML file; without it janua.toml in the working directory, if there is one
    #[arg(long, value_name = "FILE", env = "JANUA_CONFIG")]
    pub config: Option<PathBuf>,
    /// Serve the checkpoint in folder PATH under NAME; may be given several times
    #[arg(long = "model", value_name = "NAME=PATH")]
    pub models: Vec<String>,
    /// The VAE folder of a model that draws by a flow, when it is not the folder vae in the model's; may be given several times
    #[arg(long, value_name = "[NAME=]PATH")]
    pub vae: Vec<String>,
    /// Override one setting; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE", value_parser = setting)]
    pub settings: Vec<(String, String)>,
    /// No progress on stderr
    #[arg(long, short)]
    pub quiet: bool,
}

impl Args {
    /// The configuration that these flags, the environment and the file give together.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let file = self.config.clone().or_else(config::default_file);
        let mut config = Config::load(file.as_deref(), &self.settings)?;
        self.models.iter().try_for_each(|model| config.add_model(model))?;
        self.vae.iter().try_for_each(|vae| config.add_vae(vae))?;
        Ok(config)
    }

    /// Where progress is shown.
    pub fn progress(&self) -> Arc<dyn Progress> {
        if self.quiet { Arc::new(Silent) } else { Bars::or_lines() }
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a setting reads SECTION.KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}
