//! PyTorch checkpoints (`torch.save` since 1.6): a zip archive of raw storages, and a pickle that says which tensors
//! lie in them.
//!
//! A pickle is a program. This machine knows the instructions that build plain values and the four names that PyTorch
//! uses for tensors; whatever else a pickle names becomes a value that nothing can be done with. Nothing is called, and
//! every instruction adds at most one value that borrows its text from the file, so memory stays a small multiple of the
//! pickle's size.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read, Seek, SeekFrom};

use safetensors::Dtype;
use zip::{CompressionMethod, ZipArchive};

use super::header::{self, Entry, Header, MAX_HEADER, Stored};
use crate::error::Result;

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
    let broken = |e: &dyn std::fmt::Display| format!("is no PyTorch checkpoint: {e}");
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

/// A value, by its place in [`Machine::values`] wherever another one holds it.
#[derive(Debug)]
enum Value<'a> {
    /// Something that is not needed to find tensors.
    Opaque,
    Int(i64),
    Text(&'a str),
    Tuple(Vec<usize>),
    List,
    Dict(Vec<(usize, usize)>),
    /// The name of a class or function.
    Global(&'a str, &'a str),
    Storage {
        key: &'a str,
        dtype: Dtype,
    },
    Tensor(Tensor),
}

#[derive(Debug)]
struct Tensor {
    storage: String,
    dtype: Dtype,
    /// Of the first element, in elements.
    offset: u64,
    shape: Vec<usize>,
    stride: Vec<u64>,
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

#[derive(Default)]
struct Machine<'a> {
    values: Vec<Value<'a>>,
    stack: Vec<usize>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    /// Runs a pickle of protocol 2 to 5 and returns its root.
    fn run(&mut self, pickle: &'a [u8]) -> Result<usize, String> {
        let mut code = Code(pickle);
        loop {
            let op = code.byte()?;
            match op {
                // PROTO, FRAME: nothing to know.
                0x80 => drop(code.byte()?),
                0x95 => drop(code.take(8)?),
                b'.' => return self.pop(),
                b'(' => self.marks.push(self.stack.len()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.since_mark()?),
                b'2' => {
                    let top = *self.stack.last().ok_or("nothing to duplicate")?;
                    self.stack.push(top);
                }
                b'N' | 0x88 | 0x89 | 0x8f => self.push(Value::Opaque),
                b'G' => {
                    code.take(8)?;
                    self.push(Value::Opaque);
                }
                b'J' => {
                    let value = i32::from_le_bytes(code.array()?);
                    self.push(Value::Int(value.into()));
                }
                b'K' => {
                    let value = code.byte()?;
                    self.push(Value::Int(value.into()));
                }
                b'M' => {
                    let value = u16::from_le_bytes(code.array()?);
                    self.push(Value::Int(value.into()));
                }
                // LONG1: a little-endian integer of any size; what does not fit is no size of a tensor.
                0x8a => {
                    let length = code.byte()?.into();
                    let bytes = code.take(length)?;
                    self.push(if length > 8 { Value::Opaque } else { Value::Int(integer(bytes)) });
                }
                b'X' | 0x8c | 0x8d | b'U' | b'T' => {
                    let length = code.length(op)?;
                    let text = std::str::from_utf8(code.take(length)?).map_err(|_| "text that is not UTF-8")?;
                    self.push(Value::Text(text));
                }
                b'B' | b'C' | 0x8e => {
                    let length = code.length(op)?;
                    code.take(length)?;
                    self.push(Value::Opaque);
                }
                b'c' => {
                    let (module, name) = (code.line()?, code.line()?);
                    self.push(Value::Global(module, name));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let value = match (&self.values[module], &self.values[name]) {
                        (Value::Text(module), Value::Text(name)) => Value::Global(module, name),
                        _ => return Err("a name that is not text".into()),
                    };
                    self.push(value);
                }
                b']' | b'l' => {
                    if op == b'l' {
                        self.since_mark()?;
                    }
                    self.push(Value::List);
                }
                b'a' => drop(self.pop()?),
                b'e' | 0x90 => drop(self.since_mark()?),
                b')' => self.push(Value::Tuple(Vec::new())),
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items));
                }
                0x85..=0x87 => {
                    let count = usize::from(op - 0x84);
                    let first = self.floor(count)?;
                    let items = self.stack.split_off(first);
                    self.push(Value::Tuple(items));
                }
                b'}' => self.push(Value::Dict(Vec::new())),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.insert(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.insert(&items)?;
                }
                b'h' => {
                    let key = code.byte()?.into();
                    self.recall(key)?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(code.array()?);
                    self.recall(key)?;
                }
                b'q' => {
                    let key = code.byte()?.into();
                    self.remember(key)?;
                }
                b'r' => {
                    let key = u32::from_le_bytes(code.array()?);
                    self.remember(key)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(storage);
                }
                b'R' | 0x81 => {
                    let (arguments, callable) = (self.pop()?, self.pop()?);
                    self.reduce(callable, arguments)?;
                }
                // BUILD: attributes, of which weights have none that matter.
                b'b' => drop(self.pop()?),
                other => return Err(format!("instruction {other:#04x} has no place in a checkpoint")),
            }
        }
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    /// Where the last `count` values begin, none of them below an open mark.
    fn floor(&self, count: usize) -> Result<usize, String> {
        let first = self.stack.len().checked_sub(count);
        let mark = self.marks.last().copied().unwrap_or(0);
        first.filter(|&first| first >= mark).ok_or_else(|| "too few values on the stack".into())
    }

    fn pop(&mut self) -> Result<usize, String> {
        self.floor(1)?;
        self.stack.pop().ok_or_else(|| "an empty stack".into())
    }

    fn since_mark(&mut self) -> Result<Vec<usize>, String> {
        let mark = self.marks.pop().ok_or("no mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let value = *self.memo.get(&key).ok_or("a value that was never memorised")?;
        self.stack.push(value);
        Ok(())
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("nothing to memorise")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn insert(&mut self, items: &[usize]) -> Result<(), String> {
        let target = *self.stack.last().ok_or("items without a dictionary")?;
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".into());
        }
        // The attributes of other objects do not matter.
        if let Value::Dict(entries) = &mut self.values[target] {
            entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
        }
        Ok(())
    }

    fn tuple(&self, id: usize) -> &[usize] {
        match &self.values[id] {
            Value::Tuple(items) => items,
            _ => &[],
        }
    }

    /// A persistent id: ("storage", class, key, device, elements).
    fn storage(&self, id: usize) -> Result<Value<'a>, String> {
        let [kind, class, key, ..] = self.tuple(id) else { return Err("a persistent id that is no tuple".into()) };
        match (&self.values[*kind], &self.values[*class], &self.values[*key]) {
            (Value::Text("storage"), Value::Global(_, class), Value::Text(key)) => {
                let dtype = match *class {
                    "FloatStorage" => Dtype::F32,
                    "HalfStorage" => Dtype::F16,
                    "BFloat16Storage" => Dtype::BF16,
                    "DoubleStorage" => Dtype::F64,
                    "LongStorage" => Dtype::I64,
                    "IntStorage" => Dtype::I32,
                    "ShortStorage" => Dtype::I16,
                    "CharStorage" => Dtype::I8,
                    "ByteStorage" => Dtype::U8,
                    "BoolStorage" => Dtype::BOOL,
                    other => return Err(format!("a storage of unknown class {other:?}")),
                };
                Ok(Value::Storage { key, dtype })
            }
            _ => Err("a persistent id that is no storage".into()),
        }
    }

    /// What a call would give, without calling anything.
    fn reduce(&mut self, callable: usize, arguments: usize) -> Result<(), String> {
        let Value::Global(module, name) = self.values[callable] else {
            self.push(Value::Opaque);
            return Ok(());
        };
        match (module, name) {
            ("collections", "OrderedDict") => self.push(Value::Dict(Vec::new())),
            ("torch._utils", "_rebuild_parameter") => {
                let tensor = *self.tuple(arguments).first().ok_or("a parameter without a tensor")?;
                self.stack.push(tensor);
            }
            ("torch._utils", "_rebuild_tensor_v2") => {
                let tensor = self.tensor(arguments)?;
                self.push(Value::Tensor(tensor));
            }
            _ => self.push(Value::Opaque),
        }
        Ok(())
    }

    /// (storage, offset, shape, strides, ...).
    fn tensor(&self, arguments: usize) -> Result<Tensor, String> {
        let [storage, offset, shape, stride, ..] = self.tuple(arguments) else {
            return Err("a tensor with too few arguments".into());
        };
        let Value::Storage { key, dtype } = &self.values[*storage] else {
            return Err("a tensor without a storage".into());
        };
        let number = |id: &usize| match self.values[*id] {
            Value::Int(value) => u64::try_from(value).map_err(|_| format!("a negative size {value}")),
            _ => Err("a size that is no integer".to_string()),
        };
        let numbers = |id: &usize| self.tuple(*id).iter().map(number).collect::<Result<Vec<u64>, String>>();
        let (shape, stride) = (numbers(shape)?, numbers(stride)?);
        if shape.len() != stride.len() {
            return Err(format!("shape {shape:?} with strides {stride:?}"));
        }
        let shape = shape.into_iter().map(|n| usize::try_from(n).map_err(|_| "a size that overflows".to_string()));
        let shape = shape.collect::<Result<_, _>>()?;
        Ok(Tensor { storage: key.to_string(), dtype: *dtype, offset: number(offset)?, shape, stride })
    }
}

fn integer(bytes: &[u8]) -> i64 {
    let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    i64::from_le_bytes(wide)
}

/// The rest of a pickle.
struct Code<'a>(&'a [u8]);

impl<'a> Code<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or("it ends in the middle of an instruction")?;
        self.0 = rest;
        Ok(head)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, rest) = self.0.split_first_chunk().ok_or("it ends in the middle of an instruction")?;
        self.0 = rest;
        Ok(*head)
    }

    /// The length that precedes text or bytes, as wide as the instruction says.
    fn length(&mut self, op: u8) -> Result<usize, String> {
        let length = match op {
            0x8c | b'U' | b'C' => self.byte()?.into(),
            0x8d | 0x8e => u64::from_le_bytes(self.array()?),
            _ => u32::from_le_bytes(self.array()?).into(),
        };
        usize::try_from(length).map_err(|_| "a length that overflows".into())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let end = self.0.iter().position(|&b| b == b'\n').ok_or("a line without an end")?;
        let line = self.take(end + 1)?;
        std::str::from_utf8(&line[..end]).map_err(|_| "a name that is not UTF-8".into())
    }
}
