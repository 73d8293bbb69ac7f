use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::CheckpointError;
use crate::header::{self, Entry};

/// One safetensors file, mapped into memory.
#[derive(Debug)]
pub(crate) struct WeightFile {
    /// Where the file really lies, symbolic links resolved.
    pub path: PathBuf,
    map: Mmap,
}

impl WeightFile {
    /// Maps the file and parses its header. `path` may be a link, as in the Hugging Face cache.
    pub fn open(path: &Path) -> Result<(Self, Vec<Entry>), CheckpointError> {
        let refuse = |what: &str, error: std::io::Error| CheckpointError::file(path, format!("{what}: {error}"));
        let file = File::open(path).map_err(|error| refuse("cannot be opened", error))?;
        let metadata = file.metadata().map_err(|error| refuse("cannot be read", error))?;
        if !metadata.is_file() {
            return Err(CheckpointError::file(path, "is not a file"));
        }
        let real = path.canonicalize().map_err(|error| refuse("cannot be resolved", error))?;
        let map = map(&file).map_err(|error| refuse("cannot be mapped into memory", error))?;
        let entries = header::parse(path, &map)?;
        Ok((Self { path: real, map }, entries))
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Tells the system that a range will be read from front to back. Advice only: a refusal changes nothing.
    pub fn read_ahead(&self, begin: usize, end: usize) {
        #[cfg(unix)]
        let _ = self.map.advise_range(memmap2::Advice::WillNeed, begin, end - begin);
    }

    /// Gives back the memory that a range of the map takes in this process. The bytes stay in the system's cache of the file, and are
    /// mapped in again when they are next read. Whole pages around the range go with it. Advice only, too.
    #[allow(unsafe_code)]
    pub fn release(&self, begin: usize, end: usize) {
        // SAFETY: the map is of a file and never written through, so that pages which are given back hold nothing that the file does not:
        // whoever reads them next, or is reading them at this moment, gets the same bytes again.
        #[cfg(target_os = "linux")]
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, begin, end - begin) };
    }
}

#[allow(unsafe_code)]
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the map is read-only and never leaves this crate as anything but shared slices, so nothing in this process writes through it.
    // Another process could change or truncate the file while it is mapped. Weights are published once and replaced by renaming, which
    // leaves the mapped file as it is; whoever truncates a file that is being served must expect the process to die.
    unsafe { Mmap::map(file) }
}
