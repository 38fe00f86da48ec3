//! PyTorch checkpoints (`torch.save` since 1.6): a zip archive of raw storages, and a pickle that says which tensors
//! lie in them.
//!
//! A pickle is a program. This machine knows the instructions that build plain values and the four names that PyTorch
//! uses for tensors; whatever else a pickle names becomes a value that nothing can be done with. Nothing is called, and
//! every instruction adds at most one value that borrows its text from the file, so memory stays a small multiple of the
//! pickle's size.

mod machine;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read, Seek, SeekFrom};

use zip::{CompressionMethod, ZipArchive};

use super::header::{self, Entry, Header, MAX_HEADER, Stored};
use crate::error::Result;
use machine::{Machine, Tensor, Value};

/// How a zip archive begins.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// Names under which trainers keep the weights, in the order of preference of TokenFlow's reference.
const CONTAINERS: [&str; 3] = ["ema", "model", "state_dict"];

/// Reads and checks what tensors the file `name` holds.
///
/// Errors: [`crate::error::Kind::Model`] for whatever is wrong with the file.
pub(super) fn read(name: &str, file: impl Read + Seek) -> Result<Header> {
    parse(file).map_err(|what| header::broken(name, &what))
}

/// Where the bytes of a storage are: first byte of the file, and length.
type Storages = HashMap<String, (u64, u64)>;

fn parse(mut file: impl Read + Seek) -> Result<Header, String> {
    let broken = |e: &dyn std::fmt::Display| format!("is not a PyTorch checkpoint: {e}");
    let length = file.seek(SeekFrom::End(0)).map_err(|e| broken(&e))?;
    let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|e| broken(&e))?;
    let (mut pickle, mut storages) = (None, Storages::new());
    for i in 0..zip.len() {
        let mut entry = zip.by_index_raw(i).map_err(|e| broken(&e))?;
        let path = entry.name().map_err(|e| broken(&e))?.into_owned();
        // Every path is below one folder, whose name is the file's when it was saved.
        let inner = path.split_once('/').map_or(path.as_str(), |(_, rest)| rest);
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!("is compressed, which PyTorch never does: {path:?}"));
        }
        match inner {
            "data.pkl" => {
                if entry.size() > MAX_HEADER {
                    return Err(format!("has a pickle of {} bytes, more than {MAX_HEADER}", entry.size()));
                }
                let mut bytes = Vec::new();
                entry.by_ref().take(MAX_HEADER).read_to_end(&mut bytes).map_err(|e| broken(&e))?;
                pickle = Some(bytes);
            }
            "byteorder" => {
                let mut order = String::new();
                entry.by_ref().take(16).read_to_string(&mut order).map_err(|e| broken(&e))?;
                if order.trim() != "little" {
                    return Err(format!("was saved by a machine of byte order {order:?}"));
                }
            }
            _ => {
                if let Some(key) = inner.strip_prefix("data/") {
                    let start = entry.data_start().ok_or_else(|| broken(&"a storage without data"))?;
                    if start.checked_add(entry.size()).is_none_or(|end| end > length) {
                        return Err(format!("is truncated: {path:?} has {} bytes from {start} on", entry.size()));
                    }
                    storages.insert(key.to_string(), (start, entry.size()));
                }
            }
        }
    }
    let pickle = pickle.ok_or_else(|| broken(&"there is no data.pkl in it"))?;
    let mut machine = Machine::default();
    let root = machine.run(&pickle).map_err(|e| format!("has a broken pickle: {e}"))?;
    header(&machine.values, root, &storages)
}

/// The tensors of the first container that has any, or of the root itself.
fn header(values: &[Value], root: usize, storages: &Storages) -> Result<Header, String> {
    let entries = |id: usize| match &values[id] {
        Value::Dict(entries) => entries.as_slice(),
        _ => &[],
    };
    let named = |name: &str| entries(root).iter().find(|(k, _)| matches!(values[*k], Value::Text(t) if t == name));
    let tensors = |id: usize| -> Vec<(&str, &Tensor)> {
        let tensor = |&(key, value): &(usize, usize)| match (&values[key], &values[value]) {
            (Value::Text(key), Value::Tensor(tensor)) => Some((*key, tensor)),
            _ => None,
        };
        entries(id).iter().filter_map(tensor).collect()
    };
    let places = CONTAINERS.iter().filter_map(|c| named(c)).map(|&(_, id)| id).chain([root]);
    let Some(found) = places.map(tensors).find(|tensors| !tensors.is_empty()) else {
        return Err(format!("holds no tensors, neither at its root nor in {}", CONTAINERS.join(", ")));
    };
    let mut header = BTreeMap::new();
    for (key, tensor) in found {
        let entry = tensor.locate(storages).map_err(|e| format!("has a bad tensor {key:?}: {e}"))?;
        if header.insert(key.to_string(), entry).is_some() {
            return Err(format!("is broken: {key:?} is there twice"));
        }
    }
    Ok(header)
}

impl Tensor {
    fn locate(&self, storages: &Storages) -> Result<Entry, String> {
        let &(start, length) = storages.get(&self.storage).ok_or("its storage is missing")?;
        let mut row = 1u64;
        for (&size, &stride) in self.shape.iter().zip(&self.stride).rev() {
            if size > 1 && stride != row {
                return Err(format!("strides {:?} of shape {:?} are not contiguous", self.stride, self.shape));
            }
            row = row.checked_mul(size as u64).ok_or("its size overflows")?;
        }
        let width = self.dtype.bitsize() as u64 / 8;
        let bytes = row.checked_mul(width).ok_or("its size overflows")?;
        let first = self.offset.checked_mul(width).ok_or("its offset overflows")?;
        if first.checked_add(bytes).is_none_or(|end| end > length) {
            return Err(format!("bytes {first} and {bytes} more lie outside a storage of {length} bytes"));
        }
        Ok(Entry { stored: Stored::Plain(self.dtype), shape: self.shape.clone(), start: start + first, length: bytes })
    }
}

#[cfg(test)]
mod tests;
