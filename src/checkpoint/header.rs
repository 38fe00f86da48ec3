//! The header of a safetensors file, checked before any tensor is read.
//!
//! Layout: the header's length (u64, little-endian), the header (a JSON object from keys to dtype,
//! shape and offsets into the data), the data. The `safetensors` crate checks offsets and sizes; of
//! two entries of one key it would keep the last, so keys are collected here.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::Read;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// The longest header that is read, as in the reference implementation.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// The first bytes of a git-lfs pointer.
const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// How elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// One after the other.
    Plain(Dtype),
    /// In GGML's blocks.
    Blocks(GgmlDType),
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Blocks(GgmlDType::Q4K) => f.write_str("Q4_K"),
            Self::Blocks(dtype) => write!(f, "{dtype:?}"),
        }
    }
}

/// One tensor of a file.
#[derive(Debug)]
pub(super) struct Entry {
    /// How the elements are stored.
    pub(super) stored: Stored,
    /// Shape as stored.
    pub(super) shape: Vec<usize>,
    /// First byte, counted from the start of the file.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) length: u64,
}

/// Why a tensor cannot be had.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Fault {
    Missing,
    Shape { found: Vec<usize>, expected: Vec<usize> },
    Type(Stored),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("missing"),
            Self::Shape { found, expected } => write!(f, "found {}, expected {}", dims(found), dims(expected)),
            Self::Type(dtype) => write!(f, "stored as {dtype}, expected F32, F16 or BF16"),
        }
    }
}

/// Every tensor of a file by its key.
pub(super) type Header = BTreeMap<String, Entry>;

/// Reads and checks the header of the `length` bytes long file `name`.
///
/// Errors: [`crate::error::Kind::Model`] for whatever is wrong with the file.
pub(super) fn read(name: &str, mut file: impl Read, length: u64) -> Result<Header> {
    let mut start = Vec::new();
    let read = file.by_ref().take(length.min(LFS_POINTER.len() as u64)).read_to_end(&mut start);
    read.map_err(|e| broken(name, &format!("cannot be read: {e}")).because(e))?;
    check_pointer(name, &start)?;
    parse(start, &mut file, length).map_err(|what| broken(name, &what))
}

/// A file whose content cannot be trusted.
pub(super) fn broken(name: &str, what: &str) -> Error {
    Error::model(format!("{name} {what}"))
        .hint("copy the file from its origin again, or name another model: --model FOLDER")
}

/// Errors: the file that begins with these bytes is a pointer of git-lfs.
pub(super) fn check_pointer(name: &str, start: &[u8]) -> Result<()> {
    if !start.starts_with(LFS_POINTER) {
        return Ok(());
    }
    let message = format!("{name} is a git-lfs pointer file: its content was not downloaded");
    Err(Error::model(message).hint("git lfs pull, in the folder of the file"))
}

fn parse(mut text: Vec<u8>, file: &mut impl Read, length: u64) -> Result<Header, String> {
    let Some((size, _)) = text.split_first_chunk() else {
        return Err(format!("is truncated: it has {length} bytes, too few for a safetensors file"));
    };
    let size = u64::from_le_bytes(*size);
    if size > length - 8 {
        return Err(format!("is truncated or no safetensors file: a header of {size} bytes in {length} bytes"));
    }
    if size > MAX_HEADER {
        return Err(format!("has a header of {size} bytes, more than {MAX_HEADER}"));
    }
    text.drain(..8);
    text.truncate(size as usize);
    let rest = size - text.len() as u64;
    file.take(rest).read_to_end(&mut text).map_err(|e| format!("cannot be read: {e}"))?;
    let text = std::str::from_utf8(&text).map_err(|e| format!("has a header that is not UTF-8: {e}"))?;
    let Tensors(tensors) = serde_json::from_str(text).map_err(|e| format!("has a bad header: {e}"))?;
    let metadata = Metadata::new(None, tensors).map_err(|e| format!("has a bad header: {e}"))?;
    let (start, end, length) = (8 + size, metadata.data_len() as u64, length - 8 - size);
    match length.checked_sub(end) {
        None => return Err(format!("is truncated: its tensors need {end} bytes of data, it has {length}")),
        Some(0) => {}
        Some(extra) => return Err(format!("has {extra} trailing bytes that belong to no tensor")),
    }
    let entry = |info: &TensorInfo| {
        let (from, to) = info.data_offsets;
        let (start, length) = (start + from as u64, (to - from) as u64);
        Entry { stored: Stored::Plain(info.dtype), shape: info.shape.clone(), start, length }
    };
    Ok(metadata.tensors().into_iter().map(|(key, info)| (key, entry(info))).collect())
}

/// A shape as in "(2, 3)".
pub(super) fn dims(shape: &[usize]) -> String {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("({})", dims.join(", "))
}

/// The tensors of a header in the order of their data; a key that comes twice is an error.
struct Tensors(Vec<(String, TensorInfo)>);

impl<'de> Deserialize<'de> for Tensors {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TensorsVisitor)
    }
}

struct TensorsVisitor;

impl<'de> Visitor<'de> for TensorsVisitor {
    type Value = Tensors;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object from keys to tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut keys, mut tensors) = (HashSet::new(), Vec::new());
        while let Some(key) = map.next_key::<String>()? {
            if key == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                tensors.push((key.clone(), map.next_value::<TensorInfo>()?));
            }
            if let Some(key) = keys.replace(key) {
                return Err(de::Error::custom(format!("{key:?} is there twice")));
            }
        }
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        Ok(Tensors(tensors))
    }
}
