//! The instructions of a pickle, as far as they build plain values and tensors.

use std::collections::HashMap;

use safetensors::Dtype;

/// A value, by its place in [`Machine::values`] wherever another one holds it.
#[derive(Debug)]
pub(super) enum Value<'a> {
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

/// Where a tensor lies.
#[derive(Debug)]
pub(super) struct Tensor {
    pub storage: String,
    pub dtype: Dtype,
    /// Of the first element, in elements.
    pub offset: u64,
    pub shape: Vec<usize>,
    pub stride: Vec<u64>,
}

/// What has been built, and what is being built.
#[derive(Default)]
pub(super) struct Machine<'a> {
    /// All values that were built.
    pub values: Vec<Value<'a>>,
    stack: Vec<usize>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

impl<'a> Machine<'a> {
    /// Runs a pickle of protocol 2 to 5 and returns its root.
    pub fn run(&mut self, pickle: &'a [u8]) -> Result<usize, String> {
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
        let [kind, class, key, ..] = self.tuple(id) else { return Err("a persistent id that is not a tuple".into()) };
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
            _ => Err("a persistent id that is not a storage".into()),
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
        if key.len() > MAX_KEY {
            return Err(format!("a storage whose name has {} bytes", key.len()));
        }
        let number = |id: &usize| match self.values[*id] {
            Value::Int(value) => u64::try_from(value).map_err(|_| format!("a negative size {value}")),
            _ => Err("a size that is not an integer".to_string()),
        };
        let numbers = |id: &usize| match self.tuple(*id) {
            sizes if sizes.len() > MAX_RANK => Err(format!("a tensor of {} dimensions", sizes.len())),
            sizes => sizes.iter().map(number).collect::<Result<Vec<u64>, String>>(),
        };
        let (shape, stride) = (numbers(shape)?, numbers(stride)?);
        if shape.len() != stride.len() {
            return Err(format!("shape {shape:?} with strides {stride:?}"));
        }
        let shape = shape.into_iter().map(|n| usize::try_from(n).map_err(|_| "a size that overflows".to_string()));
        let shape = shape.collect::<Result<_, _>>()?;
        Ok(Tensor { storage: key.to_string(), dtype: *dtype, offset: number(offset)?, shape, stride })
    }
}

/// The most dimensions of a tensor, and bytes of the name of its storage: every tensor has a copy of both, and a few bytes of a
/// pickle make a tensor.
const MAX_RANK: usize = 8;
const MAX_KEY: usize = 256;

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
