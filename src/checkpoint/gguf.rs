//! The header of a GGUF file (versions 2 and 3), checked before any tensor is read.
//!
//! Layout: magic, version, the numbers of tensors and of settings, the settings, the tensors'
//! names, shapes (columns first), types and offsets, and their data, which begins at multiples of
//! an alignment. Of the settings only the alignment is read: the shape of the model is in
//! `config.json`.
//!
//! candle's own reader refuses tensors of five dimensions, as Qwen2.5-VL's patch embedding has; it
//! also divides by an alignment of 0, makes a 32-byte value of every byte of a setting, and drops
//! one of two tensors of the same name.

use std::io::{self, BufReader, Read};

use candle_core::quantized::GgmlDType;
use safetensors::Dtype;

use super::header::{Entry, Header, MAX_HEADER, Stored, broken};
use super::keys;
use crate::error::Result;

/// The first bytes of a file.
pub(super) const MAGIC: &[u8] = b"GGUF";

/// The longest key or name of a tensor, in bytes.
const MAX_NAME: u64 = 1 << 16;
/// Arrays in arrays go no deeper.
const MAX_DEPTH: usize = 4;
/// The most dimensions of a tensor: those of a convolution over frames, rows and columns.
const MAX_DIMS: u32 = 5;
/// Alignment of the data if the file names none.
const ALIGNMENT: u64 = 32;
const ALIGNMENT_KEY: &str = "general.alignment";

/// Types of a setting's value.
const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Reads and checks the header of the `length` bytes long file `name`.
///
/// Errors: [`crate::error::Kind::Model`] for whatever is wrong with the file.
pub(super) fn read(name: &str, file: impl Read, length: u64) -> Result<Header> {
    let mut reader = Reader { inner: BufReader::new(file.take(MAX_HEADER)), position: 0 };
    parse(&mut reader, length).map_err(|what| broken(name, &what))
}

struct Reader<R> {
    inner: R,
    position: u64,
}

impl<R: Read> Reader<R> {
    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.inner.read_exact(&mut bytes).map_err(|e| cut(&e))?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn name(&mut self) -> Result<String, String> {
        let length = self.u64()?;
        if length > MAX_NAME {
            return Err(format!("has a name of {length} bytes"));
        }
        let mut bytes = vec![0; length as usize];
        self.inner.read_exact(&mut bytes).map_err(|e| cut(&e))?;
        self.position += length;
        String::from_utf8(bytes).map_err(|_| "has a name that is not UTF-8".into())
    }

    fn skip(&mut self, length: u64) -> Result<(), String> {
        let skipped = io::copy(&mut self.inner.by_ref().take(length), &mut io::sink()).map_err(|e| cut(&e))?;
        self.position += skipped;
        if skipped == length { Ok(()) } else { Err(cut(&io::ErrorKind::UnexpectedEof.into())) }
    }

    fn skip_value(&mut self, kind: u32, depth: usize) -> Result<(), String> {
        if let Some(width) = width(kind) {
            return self.skip(width);
        }
        match kind {
            STRING => {
                let length = self.u64()?;
                self.skip(length)
            }
            ARRAY if depth < MAX_DEPTH => {
                let (kind, count) = (self.u32()?, self.u64()?);
                match width(kind) {
                    Some(width) => self.skip(count.saturating_mul(width)),
                    // Every element takes some bytes of the header, whose length is bounded.
                    None => (0..count).try_for_each(|_| self.skip_value(kind, depth + 1)),
                }
            }
            _ => Err(format!("has a setting of the unknown type {kind}")),
        }
    }
}

/// Bytes of a value of a type whose values are all of one length.
fn width(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        U32 | 5 | 6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn cut(e: &io::Error) -> String {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => format!("is truncated, or has a header of more than {MAX_HEADER} bytes"),
        _ => format!("cannot be read: {e}"),
    }
}

/// GGML's number of a type that is read here.
fn stored(kind: u32) -> Option<Stored> {
    match kind {
        0 => Some(Stored::Plain(Dtype::F32)),
        1 => Some(Stored::Blocks(GgmlDType::F16)),
        2 => Some(Stored::Blocks(GgmlDType::Q4_0)),
        8 => Some(Stored::Blocks(GgmlDType::Q8_0)),
        12 => Some(Stored::Blocks(GgmlDType::Q4K)),
        30 => Some(Stored::Blocks(GgmlDType::BF16)),
        _ => None,
    }
}

/// Bytes of a tensor with `columns` numbers in a row.
fn size(stored: Stored, columns: u64, rows: u64) -> Option<u64> {
    let (block, bytes) = match stored {
        Stored::Plain(dtype) => (1, dtype.bitsize() as u64 / 8),
        Stored::Blocks(blocks) => (blocks.block_size() as u64, blocks.type_size() as u64),
    };
    let row = columns.is_multiple_of(block).then(|| (columns / block).checked_mul(bytes))??;
    row.checked_mul(rows)
}

fn parse(reader: &mut Reader<impl Read>, length: u64) -> Result<Header, String> {
    if reader.bytes::<4>()? != MAGIC {
        return Err("is not a GGUF file".into());
    }
    let version = reader.u32()?;
    if !(2..=3).contains(&version) {
        return Err(format!("is GGUF of version {version}, not 2 or 3"));
    }
    let (tensors, settings) = (reader.u64()?, reader.u64()?);
    let mut alignment = ALIGNMENT;
    for _ in 0..settings {
        let (key, kind) = (reader.name()?, reader.u32()?);
        if key == ALIGNMENT_KEY && kind == U32 {
            alignment = u64::from(reader.u32()?);
        } else {
            reader.skip_value(kind, 0)?;
        }
    }
    if !alignment.is_power_of_two() {
        return Err(format!("aligns its data to {alignment} bytes"));
    }
    let mut found = Vec::new();
    for _ in 0..tensors {
        found.push(tensor(reader)?);
    }
    let data = reader.position.next_multiple_of(alignment);
    let mut header = Header::new();
    let mut spans = Vec::with_capacity(found.len());
    for (key, shape, stored, offset) in found {
        let (columns, rows) = shape.split_last().map_or((1, &[][..]), |(columns, rows)| (*columns, rows));
        let rows = rows.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let Some(bytes) = rows.and_then(|rows| size(stored, columns, rows)) else {
            return Err(format!("has a tensor of impossible size: {key:?} is {stored} of shape {shape:?}"));
        };
        let start = data.checked_add(offset).filter(|start| start.is_multiple_of(alignment.min(8)));
        let end = start.and_then(|start| start.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= length)) else {
            return Err(format!("is truncated or has bad offsets: {key:?} of {bytes} bytes at {offset}"));
        };
        spans.push((start, end, key.clone()));
        let shape = shape.into_iter().map(|d| d as usize).collect();
        if header.insert(key.clone(), Entry { stored, shape, start, length: bytes }).is_some() {
            return Err(format!("has the tensor {key:?} twice"));
        }
    }
    spans.sort();
    match spans.windows(2).find(|pair| pair[1].0 < pair[0].1) {
        Some(pair) => Err(format!("has bad offsets: {:?} and {:?} overlap", pair[0].2, pair[1].2)),
        None => Ok(header),
    }
}

/// Name, shape (rows first), type and offset.
fn tensor(reader: &mut Reader<impl Read>) -> Result<(String, Vec<u64>, Stored, u64), String> {
    let (name, dims) = (reader.name()?, reader.u32()?);
    if dims > MAX_DIMS {
        return Err(format!("has a tensor of {dims} dimensions: {name:?}"));
    }
    let mut shape = (0..dims).map(|_| reader.u64()).collect::<Result<Vec<_>, _>>()?;
    shape.reverse();
    let kind = reader.u32()?;
    let stored = stored(kind).ok_or_else(|| match keys::is_llama_cpp(&name) {
        true => format!("is llama.cpp's, whose names of tensors and types are not read: {name:?}"),
        false => {
            format!(
                "has a tensor of GGML's type {kind}, which is none of F32, F16, BF16, Q8_0, Q4_0 and Q4_K: {name:?}"
            )
        }
    })?;
    Ok((name, shape, stored, reader.u64()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(bytes: &mut Vec<u8>, name: &str) {
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
    }

    /// A file of version 3 with one setting and two tensors: `a`, 2x32 in Q8_0, and `b`, 3 of F32.
    fn file() -> Vec<u8> {
        let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &2u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
        put(&mut bytes, "list");
        bytes.extend([ARRAY.to_le_bytes(), STRING.to_le_bytes()].concat());
        bytes.extend(1u64.to_le_bytes());
        put(&mut bytes, "x");
        put(&mut bytes, "a");
        bytes.extend(2u32.to_le_bytes());
        bytes.extend([32u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        put(&mut bytes, "b");
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(3u64.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(96u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32) + 96 + 12, 0);
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Header> {
        read("x.gguf", bytes, bytes.len() as u64)
    }

    #[test]
    fn a_sound_file_is_read() {
        let bytes = file();
        let header = open(&bytes).unwrap();
        let (a, b) = (&header["a"], &header["b"]);
        assert_eq!((a.stored, &a.shape[..], a.length), (Stored::Blocks(GgmlDType::Q8_0), &[2, 32][..], 68));
        assert_eq!((b.stored, &b.shape[..], b.length), (Stored::Plain(Dtype::F32), &[3][..], 12));
        assert_eq!(b.start + b.length, bytes.len() as u64);
    }

    #[test]
    fn broken_files_are_refused() {
        let sound = file();
        for length in 0..sound.len() {
            assert!(open(&sound[..length]).is_err(), "{length} bytes");
        }
        let with = |at: usize, new: &[u8]| {
            let mut bytes = sound.clone();
            bytes[at..at + new.len()].copy_from_slice(new);
            open(&bytes).unwrap_err().to_string()
        };
        assert!(with(4, &1u32.to_le_bytes()).contains("version 1"));
        // Counts and lengths without end.
        assert!(with(8, &u64::MAX.to_le_bytes()).contains("x.gguf"));
        assert!(with(16, &u64::MAX.to_le_bytes()).contains("x.gguf"));
        assert!(with(24, &u64::MAX.to_le_bytes()).contains("a name of"));
        assert!(with(44, &u64::MAX.to_le_bytes()).contains("x.gguf"));
        let a = sound.windows(9).position(|w| w == *b"\x01\0\0\0\0\0\0\0a").unwrap();
        assert!(with(a + 13, &33u64.to_le_bytes()).contains("impossible size"));
        assert!(with(a + 13, &(1u64 << 63).to_le_bytes()).contains("impossible size"));
        assert!(with(a + 21, &u64::MAX.to_le_bytes()).contains("impossible size"));
        assert!(with(a + 29, &14u32.to_le_bytes()).contains("type 14"));
        assert!(with(a + 33, &32u64.to_le_bytes()).contains("overlap"));
        assert!(with(a + 33, &(u64::MAX - 7).to_le_bytes()).contains("bad offsets"));
        let twice = with(sound.windows(9).position(|w| w == *b"\x01\0\0\0\0\0\0\0b").unwrap() + 8, b"a");
        assert!(twice.contains("twice"), "{twice}");
    }
}
