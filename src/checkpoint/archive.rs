//! One file of weights, safetensors or PyTorch's: tensors read one by one. Safetensors are also
//! written, all at once.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use super::header::{self, Entry, Fault, Header, Stored};
use super::{gguf, keys, pickle};
use crate::error::{Error, Result};
use crate::io::output;
use crate::ops::{self, WeightMatrix};

/// A file whose header is sound, and where its data is.
#[derive(Debug)]
pub(super) struct Archive {
    name: String,
    header: Header,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File(Mutex<File>),
    Bytes(&'static [u8]),
}

/// Opens a regular file; anything else (a folder, a pipe) is refused.
pub(super) fn open(path: &Path) -> Result<File> {
    const FILES: &str = "--model FOLDER, with all files of one model in FOLDER; nextflow info FOLDER lists them";
    let refuse = |what: String| Error::model(format!("{} {what}", path.display())).hint(FILES);
    let cannot = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => refuse("is missing".into()).because(e),
        _ => refuse(format!("cannot be read: {e}")).because(e),
    };
    // Opening a pipe would wait for a writer, so this is checked first.
    if !path.metadata().map_err(cannot)?.is_file() {
        return Err(refuse("is not a file".into()));
    }
    File::open(path).map_err(cannot)
}

/// Numbers that are turned into blocks at a time.
const PIECE: usize = 1 << 22;

/// The longest file that is read whole, in bytes.
const MAX_SMALL: u64 = 100_000_000;

/// All of a small file: of JSON, a text tokenizer or a template.
pub(super) fn read_small(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(MAX_SMALL + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::model(format!("{} cannot be read: {e}", path.display())).because(e))?;
    if bytes.len() as u64 > MAX_SMALL {
        return Err(Error::model(format!("{} has more than {MAX_SMALL} bytes", path.display())));
    }
    header::check_pointer(&path.display().to_string(), &bytes)?;
    Ok(bytes)
}

/// The extension that files of this content have, by their first bytes.
pub(super) fn kind(path: &Path) -> Result<&'static str> {
    kind_of(&mut open(path)?)
}

fn kind_of(file: &mut File) -> Result<&'static str> {
    let mut magic = Vec::new();
    file.take(pickle::MAGIC.len() as u64).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(match &magic[..] {
        pickle::MAGIC => "pt",
        gguf::MAGIC => "gguf",
        _ => "safetensors",
    })
}

impl Archive {
    /// Opens a file and checks its header.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let (name, mut file) = (path.display().to_string(), open(path)?);
        let header = match kind_of(&mut file)? {
            "pt" => pickle::read(&name, &file)?,
            "gguf" => gguf::read(&name, &file, file.metadata()?.len())?,
            _ if path.extension().is_some_and(|e| e == "bin" || e == "pt") => {
                let mut start = Vec::new();
                (&mut file).take(64).read_to_end(&mut start)?;
                header::check_pointer(&name, &start)?;
                let message = format!("{name} is not a PyTorch checkpoint in a zip archive, as torch.save writes it");
                return Err(
                    Error::model(message).hint("load it in Python and save it with save_pretrained: safetensors")
                );
            }
            _ => header::read(&name, &file, file.metadata()?.len())?,
        };
        Ok(Self { name, header, data: Data::File(Mutex::new(file)) })
    }

    /// Checks the header of a file in memory.
    pub(super) fn from_bytes(name: String, bytes: &'static [u8]) -> Result<Self> {
        let header = header::read(&name, bytes, bytes.len() as u64)?;
        Ok(Self { name, header, data: Data::Bytes(bytes) })
    }

    /// Renames the tensors of another layout of Qwen2.5-VL to the published names.
    ///
    /// Errors: two tensors that get the same name.
    pub(super) fn publish(&mut self) -> Result<()> {
        self.header = keys::renamed(&self.name, std::mem::take(&mut self.header))?;
        Ok(())
    }

    /// Whether the key of any tensor is of some kind.
    pub(super) fn has_key(&self, is: impl Fn(&str) -> bool) -> bool {
        self.header.keys().any(|key| is(key))
    }

    /// As messages call it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Every tensor but the scales of others, which are part of the tensors that they belong to.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&String, &Entry)> {
        self.header.iter().filter(|(key, _)| {
            let owner = key.strip_suffix(".scale").and_then(|owner| self.entry(owner));
            owner.is_none_or(|owner| owner.stored != BYTES)
        })
    }

    /// The header's entry of a tensor.
    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.header.get(key)
    }

    /// A tensor as `dtype` on `device`.
    pub(super) fn read(&self, key: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let fail = |e: &dyn std::fmt::Display| candle_core::Error::Msg(format!("{}: {key}: {e}", self.name));
        let entry = self.entry(key).ok_or_else(|| fail(&"missing"))?;
        let tensor = match (entry.stored, &self.data) {
            (BYTES, _) => {
                let (bytes, scales) = self.read_bytes(key)?;
                let values = dequantise(&bytes, &scales);
                Tensor::from_vec(values, &entry.shape[..], &Device::Cpu)?.to_dtype(dtype)
            }
            (_, Data::File(file)) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(entry.start)).map_err(|e| fail(&e))?;
                decode(&mut *file, entry, dtype)
            }
            (_, Data::Bytes(bytes)) => decode(&mut &bytes[entry.start as usize..], entry, dtype),
        };
        tensor.map_err(|e| fail(&e))?.to_device(device)
    }

    /// Whether any tensor is stored as bytes with a scale per row.
    pub(super) fn has_bytes(&self) -> bool {
        self.header.iter().any(|(key, entry)| entry.stored == BYTES && self.readable(key, entry).is_ok())
    }

    /// Whether this one is.
    pub(super) fn is_bytes(&self, key: &str) -> bool {
        self.entry(key).is_some_and(|entry| entry.stored == BYTES)
    }

    /// A tensor that is stored as bytes with a scale per row: (byte - 128) * scale is a number.
    pub(super) fn read_bytes(&self, key: &str) -> candle_core::Result<(Cow<'static, [u8]>, Vec<f32>)> {
        let fail = |e: &dyn std::fmt::Display| candle_core::Error::Msg(format!("{}: {key}: {e}", self.name));
        let entry = self.entry(key).filter(|_| self.is_bytes(key)).ok_or_else(|| fail(&"not there as bytes"))?;
        let scales = self.read(&scale_key(key), DType::F32, &Device::Cpu)?.to_vec1()?;
        Ok((self.bytes(entry).map_err(|e| fail(&e))?, scales))
    }

    /// A tensor as it is stored.
    fn bytes(&self, entry: &Entry) -> io::Result<Cow<'static, [u8]>> {
        match &self.data {
            Data::File(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(entry.start))?;
                numbers(&mut *file, entry.length, |[b]: [u8; 1]| b).map(Cow::Owned)
            }
            Data::Bytes(bytes) => Ok(Cow::Borrowed(&bytes[entry.start as usize..][..entry.length as usize])),
        }
    }

    /// A tensor of two dimensions in the blocks in which it is stored or, if it is not, in blocks
    /// of `dtype`.
    pub(super) fn read_blocks(
        &self,
        key: &str,
        dtype: GgmlDType,
        device: &Device,
    ) -> candle_core::Result<WeightMatrix> {
        let fail = |e: &dyn std::fmt::Display| candle_core::Error::Msg(format!("{}: {key}: {e}", self.name));
        let entry = self.entry(key).ok_or_else(|| fail(&"missing"))?;
        let &[rows, columns] = &entry.shape[..] else { return Err(fail(&"not a matrix")) };
        match (entry.stored, &self.data) {
            (Stored::Blocks(stored), _) => {
                let bytes = self.bytes(entry).map_err(|e| fail(&e))?;
                WeightMatrix::from_blocks(bytes, stored, (rows, columns), device)
            }
            (Stored::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16), Data::File(file)) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(entry.start)).map_err(|e| fail(&e))?;
                // A few rows at a time: the tensor is never in memory as f32.
                let (at_once, mut bytes) = ((PIECE / columns.max(1)).max(1), Vec::new());
                for first in (0..rows).step_by(at_once) {
                    let count = at_once.min(rows - first);
                    let length = entry.length / rows as u64 * count as u64;
                    let piece = Entry { stored: entry.stored, shape: vec![count, columns], start: 0, length };
                    let values = decode(&mut *file, &piece, DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                    bytes.extend_from_slice(&ops::quantize(&values, (count, columns), dtype, &Device::Cpu)?.data()?);
                }
                WeightMatrix::from_blocks(bytes.into(), dtype, (rows, columns), device)
            }
            _ => {
                let values = self.read(key, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(ops::quantize(&values, (rows, columns), dtype, device)?.into())
            }
        }
    }

    /// Whether [`Archive::read`] understands how a tensor is stored: as floats, or as bytes with a
    /// scale per row. If not, what is wrong, with the key that it is wrong with.
    pub(super) fn readable(&self, key: &str, entry: &Entry) -> Result<(), (String, Fault)> {
        let plain = |key: &str, entry: &Entry| match entry.stored {
            Stored::Plain(Dtype::F32 | Dtype::F16 | Dtype::BF16) => Ok(()),
            other => Err((key.to_string(), Fault::Type(other))),
        };
        match entry.stored {
            Stored::Blocks(_) => Ok(()),
            BYTES => {
                let (key, expected) = (scale_key(key), entry.shape.iter().take(1).copied().collect());
                match self.entry(&key) {
                    None => Err((key, Fault::Missing)),
                    Some(scale) if scale.shape != expected => {
                        Err((key, Fault::Shape { found: scale.shape.clone(), expected }))
                    }
                    Some(scale) => plain(&key, scale),
                }
            }
            _ => plain(key, entry),
        }
    }
}

/// Where the scales (rows) of a tensor of bytes (rows, ...) are.
fn scale_key(key: &str) -> String {
    format!("{key}.scale")
}

/// Bytes with a scale per row.
const BYTES: Stored = Stored::Plain(Dtype::U8);

/// The byte that means zero.
const ZERO: f32 = 128.0;

/// Adds `tensor` to `tensors` as bytes with one scale per row of its first dimension: value = (byte
/// - 128) * scale.
pub fn quantise(tensors: &mut BTreeMap<String, Tensor>, key: String, tensor: &Tensor) -> candle_core::Result<()> {
    let rows = tensor.to_dtype(DType::F32)?.flatten_from(1)?;
    let scale = (rows.abs()?.max_keepdim(1)? / 127.0)?.clamp(f32::MIN_POSITIVE, f32::MAX)?;
    let bytes =
        (rows.broadcast_div(&scale)?.round()? + f64::from(ZERO))?.to_dtype(DType::U8)?.reshape(tensor.shape())?;
    tensors.insert(scale_key(&key), scale.squeeze(1)?);
    tensors.insert(key, bytes);
    Ok(())
}

/// Undoes [`quantise`]: bytes (rows, ...) and scales (rows).
fn dequantise(bytes: &[u8], scales: &[f32]) -> Vec<f32> {
    let mut values = Vec::with_capacity(bytes.len());
    let rows = bytes.chunks_exact((bytes.len() / scales.len().max(1)).max(1));
    for (row, scale) in rows.zip(scales) {
        values.extend(row.iter().map(|&byte| (f32::from(byte) - ZERO) * scale));
    }
    values
}

fn decode(file: &mut impl Read, entry: &Entry, dtype: DType) -> candle_core::Result<Tensor> {
    match entry.stored {
        Stored::Blocks(blocks) => unblock(file, entry, blocks)?.to_dtype(dtype),
        Stored::Plain(Dtype::F32) => tensor(file, entry, dtype, f32::from_le_bytes),
        Stored::Plain(Dtype::F16) => tensor(file, entry, dtype, |b| f16::from_le_bytes(b).to_f32()),
        Stored::Plain(Dtype::BF16) => tensor(file, entry, dtype, |b| bf16::from_le_bytes(b).to_f32()),
        other => Err(candle_core::Error::Msg(format!("stored as {other}, expected F32, F16, BF16 or scaled U8"))),
    }
}

fn unblock(file: &mut impl Read, entry: &Entry, dtype: GgmlDType) -> candle_core::Result<Tensor> {
    let bytes = numbers(file, entry.length, |[b]: [u8; 1]| b)?;
    let mut values = vec![0f32; entry.shape.iter().product()];
    ops::dequantize(&bytes, dtype, &mut values)?;
    Tensor::from_vec(values, entry.shape.as_slice(), &Device::Cpu)
}

/// Converts through f32 while reading: exact unless `dtype` is narrower than the stored type.
fn tensor<const N: usize>(
    file: &mut impl Read,
    entry: &Entry,
    dtype: DType,
    f: impl Fn([u8; N]) -> f32,
) -> candle_core::Result<Tensor> {
    let (shape, n) = (entry.shape.as_slice(), entry.length);
    match dtype {
        DType::BF16 => Tensor::from_vec(numbers(file, n, |b| bf16::from_f32(f(b)))?, shape, &Device::Cpu),
        DType::F16 => Tensor::from_vec(numbers(file, n, |b| f16::from_f32(f(b)))?, shape, &Device::Cpu),
        _ => Tensor::from_vec(numbers(file, n, f)?, shape, &Device::Cpu)?.to_dtype(dtype),
    }
}

/// Reads `length` bytes a piece at a time, so that they are never in memory beside the numbers.
fn numbers<const N: usize, T>(file: &mut impl Read, length: u64, f: impl Fn([u8; N]) -> T) -> io::Result<Vec<T>> {
    let mut left = length as usize;
    let mut numbers = Vec::new();
    numbers.try_reserve_exact(left / N)?;
    let mut buffer = vec![0; left.min(1 << 18)];
    while left > 0 {
        let piece = left.min(1 << 18);
        file.read_exact(&mut buffer[..piece])?;
        numbers.extend(buffer[..piece].as_chunks().0.iter().map(|&b| f(b)));
        left -= piece;
    }
    Ok(numbers)
}

/// All weights of a file, as f32.
pub fn load(path: &Path) -> Result<BTreeMap<String, Tensor>> {
    let archive = Archive::open(path)?;
    let weights = archive.tensors().filter(|(key, entry)| archive.readable(key, entry).is_ok());
    weights.map(|(key, _)| Ok((key.clone(), archive.read(key, DType::F32, &Device::Cpu)?))).collect()
}

/// The metadata of a safetensors file, which [`save`] wrote.
///
/// Errors: a file that cannot be read, or is none of safetensors.
pub fn metadata(path: &Path) -> Result<HashMap<String, String>> {
    let broken = |what: String| header::broken(&path.display().to_string(), &what);
    let bytes = std::fs::read(path).map_err(|e| broken(format!("cannot be read: {e}")).because(e))?;
    let (_, header) =
        SafeTensors::read_metadata(&bytes).map_err(|e| broken(format!("has a bad header: {e}")).because(e))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// Writes a safetensors file with optional metadata, as [`output::write`] does.
pub fn save(path: &Path, tensors: BTreeMap<String, Tensor>, metadata: Option<HashMap<String, String>>) -> Result<()> {
    let bytes = safetensors::serialize(tensors, metadata).map_err(|e| Error::unwritten(path, &e).because(e))?;
    output::write(path, &bytes)
}
