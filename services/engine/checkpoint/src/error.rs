use std::path::{Path, PathBuf};

/// Why a checkpoint cannot be used. `Display` is one line that names the file, tensor or field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder is missing, unreadable or not what its name says.
    #[error("{}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    /// A field of a JSON file is missing or of the wrong type.
    #[error("{file}: field {field}: {reason} (in {})", dir.display())]
    Field { dir: PathBuf, file: String, field: String, reason: String },
    /// A tensor is described wrongly or holds values that cannot be weights.
    #[error("{}: tensor {name}: {reason}", path.display())]
    Tensor { path: PathBuf, name: String, reason: String },
    /// No weight file has the tensor.
    #[error("missing tensor {name} (in {})", dir.display())]
    MissingTensor { dir: PathBuf, name: String },
}

impl CheckpointError {
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn tensor(path: &Path, name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { path: path.to_path_buf(), name: shown(name), reason: reason.into() }
    }
}

/// A name that came out of a file, safe to print: control characters escaped and cut to a length that fits a line.
pub(crate) fn shown(name: &str) -> String {
    const LONGEST: usize = 200; // characters
    let mut text: String = name.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if name.chars().nth(LONGEST).is_some() {
        text.push_str("...");
    }
    text
}
