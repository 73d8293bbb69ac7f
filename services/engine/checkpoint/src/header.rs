//! The header of a safetensors file: eight bytes of length, then a JSON object that gives every tensor's type, shape and byte range.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::shown;
use crate::{CheckpointError, Dtype};

/// The limit of the format itself.
const LONGEST: u64 = 100_000_000; // bytes

/// One tensor of a file, its range checked against the file's length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Range of the tensor in the file, in bytes.
    pub begin: usize,
    pub end: usize,
}

/// Parses the header in `data` (a whole file) and checks every entry: known type, size that fits shape and type, ranges that cover the
/// data section without overlap or gap.
pub(crate) fn parse(path: &Path, data: &[u8]) -> Result<Vec<Entry>, CheckpointError> {
    let (header, start) = split(path, data)?;
    let RawHeader(raw) = serde_json::from_slice(header)
        .map_err(|error| CheckpointError::file(path, format!("garbage in the safetensors header: {}", shown(&error.to_string()))))?;
    let mut entries = raw.into_iter().map(|(name, raw)| entry(path, name, raw, start)).collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(|entry| (entry.begin, entry.end));
    refuse_duplicates(path, &entries)?;
    cover(path, &entries, start, data.len())?;
    Ok(entries)
}

/// The header's JSON and the offset at which the data section starts.
fn split<'a>(path: &Path, data: &'a [u8]) -> Result<(&'a [u8], usize), CheckpointError> {
    let refuse = |reason: String| Err(CheckpointError::file(path, reason));
    if data.starts_with(b"version https://git-lfs") {
        return refuse("is a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`".into());
    }
    let Some((length, rest)) = data.split_first_chunk::<8>() else {
        return refuse(format!("truncated: a safetensors file has at least 8 bytes, this one {}", data.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > LONGEST {
        return refuse(format!("header too large: {length} bytes where at most {LONGEST} are allowed (is this a safetensors file?)"));
    }
    let length = length as usize; // at most LONGEST
    if length > rest.len() {
        return refuse(format!("truncated: the header alone needs {} bytes, the file has {}", 8 + length, data.len()));
    }
    Ok((&rest[..length], 8 + length))
}

fn entry(path: &Path, name: String, raw: RawEntry, start: usize) -> Result<Entry, CheckpointError> {
    let refuse = |reason: String| CheckpointError::tensor(path, &name, reason);
    let dtype = Dtype::from_name(&raw.dtype).ok_or_else(|| refuse(format!("unknown dtype {}", shown(&raw.dtype))))?;
    let [begin, end] = raw.data_offsets;
    let size = raw.shape.iter().try_fold(dtype.size() as u64, |size, &length| size.checked_mul(length));
    let size = size.ok_or_else(|| refuse(format!("the shape {:?} overflows", raw.shape)))?;
    if end.checked_sub(begin) != Some(size) {
        return Err(refuse(format!("byte range {begin}..{end} does not fit shape {:?} of {dtype} ({size} bytes)", raw.shape)));
    }
    let (absolute_begin, absolute_end) = (begin.checked_add(start as u64), end.checked_add(start as u64));
    let (Some(begin), Some(end)) = (absolute_begin.and_then(index), absolute_end.and_then(index)) else {
        return Err(refuse(format!("byte range {begin}..{end} is out of range")));
    };
    let shape = raw.shape.iter().map(|&length| index(length)).collect::<Option<Vec<_>>>();
    let shape = shape.ok_or_else(|| refuse(format!("the shape {:?} overflows", raw.shape)))?;
    Ok(Entry { name, dtype, shape, begin, end })
}

fn index(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

/// `entries` (by offset) must tile `start..length`: the format allows neither overlap nor holes.
fn cover(path: &Path, entries: &[Entry], start: usize, length: usize) -> Result<(), CheckpointError> {
    let needed = entries.iter().map(|entry| entry.end).max().unwrap_or(start);
    let mut reached = start;
    let mut previous: Option<&Entry> = None;
    for entry in entries {
        if entry.begin < reached {
            let other = previous.map_or("the header".into(), |previous| format!("tensor {}", shown(&previous.name)));
            return Err(CheckpointError::tensor(path, &entry.name, format!("overlaps {other}")));
        }
        if entry.end > length {
            return Err(CheckpointError::tensor(path, &entry.name, format!("truncated file: {needed} bytes expected, {length} there")));
        }
        if entry.begin > reached {
            return Err(CheckpointError::tensor(path, &entry.name, format!("{} unused bytes before it", entry.begin - reached)));
        }
        reached = entry.end;
        previous = Some(entry);
    }
    if reached < length {
        return Err(CheckpointError::file(
            path,
            format!("{} bytes after the last tensor: {reached} expected, {length} there", length - reached),
        ));
    }
    Ok(())
}

fn refuse_duplicates(path: &Path, entries: &[Entry]) -> Result<(), CheckpointError> {
    let mut seen = std::collections::HashSet::with_capacity(entries.len());
    match entries.iter().find(|entry| !seen.insert(&entry.name)) {
        Some(entry) => Err(CheckpointError::tensor(path, &entry.name, "listed twice")),
        None => Ok(()),
    }
}

/// An entry as written; offsets count from the start of the data section.
#[derive(Deserialize)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// All entries but `__metadata__`, duplicates included (a JSON map type would silently keep the last one).
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with one entry per tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                let value = map.next_value().map_err(|error| serde::de::Error::custom(format!("tensor {}: {error}", shown(&name))))?;
                entries.push((name, value));
            }
        }
        Ok(RawHeader(entries))
    }
}
