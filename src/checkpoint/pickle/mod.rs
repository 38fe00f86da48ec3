//! PyTorch checkpoints (`torch.save` since 1.6): a zip archive of raw storages, and a pickle that
//! says which tensors they hold.
//!
//! candle's reader would not do: it clones memoised values, which can grow exponentially, allocates
//! what a length in the file says, and knows neither the newer instructions nor tensors with
//! attributes.
//!
//! A pickle is a program. This machine knows the instructions that build plain values and the names
//! that PyTorch uses for tensors; whatever else a pickle names becomes a value that nothing can be
//! done with. Nothing is called, and memory is bounded, whatever the file says.

mod code;
mod machine;
mod opcode;
mod value;

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use zip::{CompressionMethod, ZipArchive};

use super::header::{self, Entry, Header, Stored};
use crate::error::Result;
use machine::Machine;
use value::{Id, Tensor};

/// The first bytes of a zip archive.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// Where trainers put the weights, in the order of preference of TokenFlow's reference; then
/// Infinity's.
const CONTAINERS: [&[&str]; 5] = [&["ema"], &["model"], &["state_dict"], &["vae"], &["trainer", "gpt_fsdp"]];

/// The longest pickle, in bytes: that of a model of 700 tensors has 100,000.
const MAX_PICKLE: u64 = 16 << 20;
/// The longest list of files of the archive, in bytes; what is made of it is six times as large.
const MAX_DIRECTORY: u64 = 8 << 20;
/// The most tensors.
const MAX_TENSORS: usize = 100_000;

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
    let left = Cell::new(MAX_DIRECTORY);
    let mut zip = ZipArchive::new(BufReader::new(Bounded { file, left: &left })).map_err(|e| broken(&e))?;
    left.set(u64::MAX);
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
                if entry.size() > MAX_PICKLE {
                    return Err(format!("has a pickle of {} bytes, more than {MAX_PICKLE}", entry.size()));
                }
                let mut bytes = Vec::new();
                entry.by_ref().take(MAX_PICKLE).read_to_end(&mut bytes).map_err(|e| broken(&e))?;
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
    let mut machine = Machine::new(&pickle);
    let root = machine.run().map_err(|e| format!("has a broken pickle: {e}"))?;
    header(&machine, weights(&machine, root)?, &storages)
}

/// A file with a limit on the bytes that are read.
struct Bounded<'a, F> {
    file: F,
    left: &'a Cell<u64>,
}

impl<F: Read> Read for Bounded<'_, F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        let left = self.left.get().checked_sub(read as u64);
        self.left
            .set(left.ok_or_else(|| io::Error::other(format!("its list of files has over {MAX_DIRECTORY} bytes")))?);
        Ok(read)
    }
}

impl<F: Seek> Seek for Bounded<'_, F> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// The dictionary of the weights: the first of the known containers that has any tensors, or the
/// root, or the only dictionary in it that has any.
fn weights(machine: &Machine, root: Id) -> Result<Id, String> {
    let has_tensors = |id: Id| machine.entries(id).iter().any(|&(_, value)| machine.tensor(value).is_some());
    let named = |id: Id, name: &&str| {
        let entry = machine.entries(id).iter().find(|(key, _)| machine.text(*key) == Some(name));
        entry.map(|&(_, value)| value)
    };
    let known = CONTAINERS.iter().filter_map(|path| path.iter().try_fold(root, named));
    if let Some(found) = known.chain([root]).find(|&id| has_tensors(id)) {
        return Ok(found);
    }
    let others: Vec<(Id, Id)> = machine.entries(root).iter().copied().filter(|&(_, id)| has_tensors(id)).collect();
    match others[..] {
        [(_, only)] => Ok(only),
        [] => {
            let known: Vec<String> = CONTAINERS.iter().map(|path| path.join(".")).collect();
            Err(format!("holds no tensors, neither at its root nor in {}", known.join(", ")))
        }
        [(one, _), (other, _), ..] => {
            let name = |key: Id| machine.text(key).unwrap_or("a key that is not text");
            Err(format!("holds tensors in several places, {:?} and {:?} among them", name(one), name(other)))
        }
    }
}

/// The tensors of a dictionary. Plain values among them, such as the count of steps, are left out.
fn header(machine: &Machine, weights: Id, storages: &Storages) -> Result<Header, String> {
    let mut header = BTreeMap::new();
    for &(key, value) in machine.entries(weights) {
        let name = machine.text(key);
        let Some(tensor) = machine.tensor(value) else {
            if machine.holds_tensors(value) {
                return Err(format!("has a value that cannot be read: {:?}", name.unwrap_or("(no text)")));
            }
            continue;
        };
        let key = name.ok_or("has a tensor whose key is not text, or too long")?;
        let entry = tensor.and_then(|tensor| tensor.locate(storages));
        let entry = entry.map_err(|e| format!("has a bad tensor {key:?}: {e}"))?;
        if header.insert(key.to_string(), entry).is_some() {
            return Err(format!("is broken: {key:?} is there twice"));
        }
        if header.len() > MAX_TENSORS {
            return Err(format!("has more than {MAX_TENSORS} tensors"));
        }
    }
    Ok(header)
}

impl Tensor<'_> {
    fn locate(&self, storages: &Storages) -> Result<Entry, String> {
        let &(start, length) = storages.get(self.storage).ok_or("its storage is missing")?;
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
