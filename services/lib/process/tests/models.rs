//! Opening the configured models: what is shown, what is refused, and with which exit code.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use config::Config;
use process::{Bar, Progress, Silent, Unit, exit_code, open_models};

/// What was begun, and how far it came.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<(String, u64, u64)>>>);

impl Progress for Seen {
    fn start(&self, what: &str, total: u64, unit: Unit) -> Box<dyn Bar> {
        assert_eq!(unit, Unit::Bytes);
        self.0.lock().unwrap().push((what.to_owned(), total, 0));
        Box::new(self.clone())
    }
}

impl Bar for Seen {
    fn set(&mut self, done: u64) {
        self.0.lock().unwrap().last_mut().unwrap().2 = done;
    }
}

fn config(models: &[(&str, &Path)]) -> Config {
    let mut config = Config::default();
    models.iter().for_each(|(name, path)| config.add_model(&format!("{name}={}", path.display())).unwrap());
    config
}

#[tokio::test]
async fn weights_are_read_once_and_shown() {
    let (llama, janus) = (testkit::fixture("llama"), testkit::fixture("janus"));
    let config = config(&[("a", &llama), ("b", &janus)]);
    let seen = Seen::default();
    let models = open_models(&config, &(Arc::new(seen.clone()) as Arc<dyn Progress>), true).await.unwrap();
    let told = seen.0.lock().unwrap();
    assert_eq!(models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    for (model, (what, total, done)) in models.iter().zip(told.iter()) {
        assert_eq!((what.as_str(), *total), (format!("reading {}", model.name).as_str(), model.checkpoint.total_bytes()));
        assert_eq!(done, total);
    }
}

#[tokio::test]
async fn a_bad_folder_is_named_with_its_model() {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(testkit::fixture("llama")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let weights = folder.path().join("model.safetensors");
    let whole = fs::metadata(&weights).unwrap().len();
    fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(whole / 2).unwrap();
    for (path, named) in [(Path::new("/nonexistent"), "/nonexistent"), (folder.path(), "model.safetensors")] {
        let progress = Arc::new(Silent) as Arc<dyn Progress>;
        let error = open_models(&config(&[("tiny", path)]), &progress, false).await.err().unwrap();
        let line = format!("{error:#}");
        assert!(line.starts_with("model tiny: ") && line.contains(named) && !line.contains('\n'), "{line}");
        assert_eq!(exit_code(&error), 66, "{line}");
    }
}
