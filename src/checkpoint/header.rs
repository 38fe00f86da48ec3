//! The header of a safetensors file, checked before anything is made of it.
//!
//! Layout: the header's length (u64, little-endian), the header (a JSON object from keys to dtype, shape and offsets
//! into the data), the data. The `safetensors` crate keeps the last of two entries of one key without a word, so the
//! header is parsed here.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{self, Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// The longest header that is read, as in the reference implementation.
pub(super) const MAX_HEADER: u64 = 100_000_000;

/// How a git-lfs pointer begins.
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

/// Every tensor of a file by its key.
pub(super) type Header = BTreeMap<String, Entry>;

/// Reads and checks the header of the `length` bytes long file `name`.
///
/// Errors: [`crate::error::Kind::Model`] for whatever is wrong with the file.
pub(super) fn read(name: &str, mut file: impl Read, length: u64) -> Result<Header> {
    parse(&mut file, length).map_err(|fault| match fault {
        Fault::Pointer => {
            let message = format!("{name} is a git-lfs pointer file: the weights themselves were not downloaded");
            Error::model(message).hint("git lfs pull, in the folder of the file")
        }
        Fault::Broken(what) => broken(name, &what),
    })
}

/// A file whose content cannot be trusted.
pub(super) fn broken(name: &str, what: &str) -> Error {
    Error::model(format!("{name} {what}"))
        .hint("copy the file from its origin again, or name another model: --model FOLDER")
}

enum Fault {
    Pointer,
    Broken(String),
}

impl From<String> for Fault {
    fn from(what: String) -> Self {
        Self::Broken(what)
    }
}

fn parse(file: &mut impl Read, length: u64) -> Result<Header, Fault> {
    let unreadable = |e| Fault::Broken(format!("cannot be read: {e}"));
    let mut text = Vec::new();
    file.take(length.min(LFS_POINTER.len() as u64)).read_to_end(&mut text).map_err(unreadable)?;
    if text == LFS_POINTER {
        return Err(Fault::Pointer);
    }
    let Some((size, _)) = text.split_first_chunk() else {
        return Err(format!("is truncated: it has {length} bytes, too few for a safetensors file").into());
    };
    let size = u64::from_le_bytes(*size);
    if size > length - 8 {
        return Err(format!("is truncated or no safetensors file: a header of {size} bytes in {length} bytes").into());
    }
    if size > MAX_HEADER {
        return Err(format!("has a header of {size} bytes, more than {MAX_HEADER}").into());
    }
    text.drain(..8);
    text.truncate(size as usize);
    let rest = size - text.len() as u64;
    file.take(rest).read_to_end(&mut text).map_err(unreadable)?;
    let text = std::str::from_utf8(&text).map_err(|e| format!("has a header that is not UTF-8: {e}"))?;
    let Raw(raw) = serde_json::from_str(text).map_err(|e| format!("has a bad header: {e}"))?;
    Ok(check(raw, 8 + size, length - 8 - size)?)
}

/// Checks that the tensors, whose data begins at byte `start` of the file, fill its `length` bytes without gaps.
fn check(raw: BTreeMap<String, RawEntry>, start: u64, length: u64) -> Result<Header, String> {
    let mut spans = Vec::with_capacity(raw.len());
    let mut header = Header::new();
    for (key, RawEntry { dtype, shape, data_offsets: (from, to) }) in raw {
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |n, &d| n.checked_mul(d as u64));
        let Some(bits) = bits.filter(|bits| bits % 8 == 0) else {
            return Err(format!("has a tensor of impossible size: {key:?} is {dtype} of shape {}", dims(&shape)));
        };
        if from > to || to - from != bits / 8 {
            let expected = format!("{dtype} of shape {} needs {} bytes", dims(&shape), bits / 8);
            return Err(format!("has bad offsets: {key:?} is at {from}..{to}, but {expected}"));
        }
        if to > length {
            return Err(format!("is truncated: {key:?} is at {from}..{to} of only {length} bytes of data"));
        }
        spans.push((from, to, key.clone()));
        header.insert(key, Entry { stored: Stored::Plain(dtype), shape, start: start + from, length: to - from });
    }
    spans.sort();
    let mut end = 0;
    for (from, to, key) in spans {
        if from != end {
            let fault = if from > end { "a hole before" } else { "an overlap at" };
            return Err(format!("has bad offsets: {fault} {key:?} ({from}..{to}, the one before ends at {end})"));
        }
        end = to;
    }
    match length - end {
        0 => Ok(header),
        extra => Err(format!("has {extra} trailing bytes that belong to no tensor")),
    }
}

/// A shape as in "(2, 3)".
pub(super) fn dims(shape: &[usize]) -> String {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    format!("({})", dims.join(", "))
}

#[derive(Deserialize)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// The entries of a header; a key that comes twice is an error.
struct Raw(BTreeMap<String, RawEntry>);

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawVisitor).map(Raw)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = BTreeMap<String, RawEntry>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object from keys to tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut entries, mut metadata) = (BTreeMap::new(), false);
        while let Some(key) = map.next_key::<String>()? {
            let again = if key == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                std::mem::replace(&mut metadata, true)
            } else {
                entries.insert(key.clone(), map.next_value()?).is_some()
            };
            if again {
                return Err(de::Error::custom(format!("{key:?} is there twice")));
            }
        }
        Ok(entries)
    }
}
