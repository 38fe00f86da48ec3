//! The instructions of a pickle, as far as they build plain values and tensors.

use std::collections::HashMap;

use super::code::{Code, Span};
use super::opcode::*;
use super::value::{Class, Id, Tensor, Value};

/// The most instructions that are run; each adds one value, of some 40 bytes with its share of
/// everything else, at most. A tensor takes about 40 of them, so that 25,000 tensors fit.
const MAX_INSTRUCTIONS: usize = 1 << 20;

/// The entries of a dictionary.
#[derive(Debug, Default)]
struct Dict {
    entries: Vec<(Id, Id)>,
    /// Whether a tensor or something unknown is among the values.
    holds_tensors: bool,
}

/// Values built so far, and those under construction.
pub(super) struct Machine<'a> {
    code: Code<'a>,
    /// All values that were built.
    values: Vec<Value>,
    /// The items of all tuples.
    items: Vec<Id>,
    dicts: Vec<Dict>,
    stack: Vec<Id>,
    /// Heights of the stack at the open marks.
    marks: Vec<u32>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    /// A machine for a pickle of less than 4 GB.
    pub fn new(pickle: &'a [u8]) -> Self {
        let (values, items, dicts, stack, marks) = (Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self { code: Code::new(pickle), values, items, dicts, stack, marks, memo: HashMap::new() }
    }

    /// Runs the pickle, of protocol 2 to 5, and returns its root.
    ///
    /// Errors: an instruction that checkpoints do not have, or that cannot be run, and too many of
    /// them.
    pub fn run(&mut self) -> Result<Id, String> {
        for _ in 0..MAX_INSTRUCTIONS {
            match self.code.byte()? {
                STOP => return self.pop(),
                op => self.step(op)?,
            }
        }
        Err(format!("it has more than {MAX_INSTRUCTIONS} instructions"))
    }

    fn step(&mut self, op: u8) -> Result<(), String> {
        match op {
            PROTO => drop(self.code.byte()?),
            FRAME => drop(self.code.take(8)?),
            MARK => self.marks.push(self.stack.len() as u32),
            POP | APPEND | BUILD => {
                let top = self.pop()?;
                if op == APPEND {
                    self.append(&[top])?;
                }
            }
            POP_MARK => drop(self.since_mark()?),
            DUP => self.stack.push(*self.stack.last().ok_or("nothing to duplicate")?),
            EMPTY_LIST => self.push(Value::List),
            EMPTY_TUPLE => self.push(Value::Tuple(Span { start: 0, length: 0 }, false)),
            EMPTY_DICT => self.push(Value::Dict(None)),
            EMPTY_SET => self.push(Value::List),
            LIST | FROZENSET => {
                let items = self.since_mark()?;
                self.push(Value::List);
                self.append(&items)?;
            }
            APPENDS | ADDITEMS => {
                let items = self.since_mark()?;
                self.append(&items)?;
            }
            TUPLE => {
                let first = self.mark()?;
                self.tuple(first);
            }
            TUPLE1 | TUPLE2 | TUPLE3 => {
                let first = self.floor(usize::from(op - TUPLE1) + 1)?;
                self.tuple(first);
            }
            SETITEM => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.insert(&[key, value])?;
            }
            SETITEMS => {
                let items = self.since_mark()?;
                self.insert(&items)?;
            }
            BINGET | LONG_BINGET => {
                let key = self.code.memo_key(op == BINGET)?;
                let value = *self.memo.get(&key).ok_or("a value that was never memorised")?;
                self.stack.push(value);
            }
            BINPUT | LONG_BINPUT => {
                let key = self.code.memo_key(op == BINPUT)?;
                self.memorise(key)?;
            }
            MEMOIZE => self.memorise(self.memo.len() as u32)?,
            GLOBAL => {
                let (module, name) = (self.code.line()?, self.code.line()?);
                self.push(Value::Class(Class::of(module, name)));
            }
            STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Some(module), Some(name)) = (self.text(module), self.text(name)) else {
                    return Err("a name that is not text".into());
                };
                self.push(Value::Class(Class::of(module, name)));
            }
            BINPERSID => {
                let id = self.pop()?;
                let storage = self.storage(id)?;
                self.push(storage);
            }
            REDUCE | NEWOBJ => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.reduce(callable, arguments)?;
            }
            NEWOBJ_EX => {
                self.stack.truncate(self.floor(3)?);
                self.push(Value::Unknown);
            }
            _ => self.literal(op)?,
        }
        Ok(())
    }

    /// An instruction whose value follows it.
    fn literal(&mut self, op: u8) -> Result<(), String> {
        let value = match op {
            NONE | NEWTRUE | NEWFALSE => Value::Plain,
            BINFLOAT => {
                self.code.take(8)?;
                Value::Plain
            }
            BININT => Value::Int(i32::from_le_bytes(self.code.array()?).into()),
            BININT1 => Value::Int(self.code.byte()?.into()),
            BININT2 => Value::Int(u16::from_le_bytes(self.code.array()?).into()),
            // What does not fit is no size of a tensor.
            LONG1 | LONG4 => self.code.long(op)?.map_or(Value::Plain, Value::Int),
            BINUNICODE | SHORT_BINUNICODE | BINUNICODE8 | BINSTRING | SHORT_BINSTRING => {
                let length = self.code.length(op)?;
                let (start, bytes) = (self.code.at, self.code.take(length)?);
                std::str::from_utf8(bytes).map_err(|_| "text that is not UTF-8")?;
                match length {
                    ..=MAX_TEXT => Value::Text(Span { start: start as u32, length: length as u32 }),
                    // No name of anything.
                    _ => Value::Plain,
                }
            }
            BINBYTES | SHORT_BINBYTES | BINBYTES8 | BYTEARRAY8 => {
                let length = self.code.length(op)?;
                self.code.take(length)?;
                Value::Plain
            }
            other => return Err(format!("instruction {other:#04x} has no place in a checkpoint")),
        };
        self.push(value);
        Ok(())
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    /// Where the last `count` values of the stack begin, none of them below an open mark.
    fn floor(&self, count: usize) -> Result<usize, String> {
        let first = self.stack.len().checked_sub(count);
        let mark = self.marks.last().map_or(0, |&mark| mark as usize);
        first.filter(|&first| first >= mark).ok_or_else(|| "too few values on the stack".into())
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.floor(1)?;
        self.stack.pop().ok_or_else(|| "an empty stack".into())
    }

    /// Closes a mark; returns where the values above it begin.
    fn mark(&mut self) -> Result<usize, String> {
        let mark = self.marks.pop().ok_or("no mark")? as usize;
        Ok(mark.min(self.stack.len()))
    }

    fn since_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.mark()?;
        Ok(self.stack.split_off(mark))
    }

    fn memorise(&mut self, key: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("nothing to memorise")?;
        self.memo.insert(key, top);
        Ok(())
    }

    /// Makes a tuple of the stack from `first` on.
    fn tuple(&mut self, first: usize) {
        let holds_tensors = self.stack[first..].iter().any(|&item| self.holds_tensors(item));
        let span = Span { start: self.items.len() as u32, length: (self.stack.len() - first) as u32 };
        self.items.extend(self.stack.drain(first..));
        self.push(Value::Tuple(span, holds_tensors));
    }

    fn append(&mut self, items: &[Id]) -> Result<(), String> {
        let target = *self.stack.last().ok_or("items without a list")?;
        if items.iter().any(|&item| self.holds_tensors(item)) {
            self.values[target as usize] = Value::Unknown;
        }
        Ok(())
    }

    fn insert(&mut self, items: &[Id]) -> Result<(), String> {
        let target = *self.stack.last().ok_or("items without a dictionary")? as usize;
        let (pairs, []) = items.as_chunks::<2>() else { return Err("a key without a value".into()) };
        // The attributes of other objects do not matter.
        let Value::Dict(index) = self.values[target] else { return Ok(()) };
        if pairs.is_empty() {
            return Ok(());
        }
        let index = index.unwrap_or(self.dicts.len() as u32);
        if index as usize == self.dicts.len() {
            self.dicts.push(Dict::default());
            self.values[target] = Value::Dict(Some(index));
        }
        let holds_tensors = pairs.iter().any(|&[_, value]| self.holds_tensors(value));
        let dict = &mut self.dicts[index as usize];
        dict.entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        dict.holds_tensors |= holds_tensors;
        Ok(())
    }

    /// A persistent id: ("storage", class, key, device, elements).
    fn storage(&self, id: Id) -> Result<Value, String> {
        let [kind, class, key, ..] = *self.items(id) else {
            return Err("a persistent id that is not a tuple".into());
        };
        match (self.text(kind), self.value(class), self.value(key)) {
            (Some("storage"), Value::Class(Class::Storage(dtype)), Value::Text(key)) => Ok(Value::Storage(key, dtype)),
            (Some("storage"), Value::Class(_), _) => Err("a storage of an unknown class".into()),
            _ => Err("a persistent id that is not a storage".into()),
        }
    }

    /// The result of a call, without calling anything.
    fn reduce(&mut self, callable: Id, arguments: Id) -> Result<(), String> {
        let called = |machine: &Self, callable: Id| match machine.value(callable) {
            Value::Class(class) => class,
            _ => Class::Other,
        };
        let (mut class, mut arguments) = (called(self, callable), arguments);
        if let (Class::FromType, &[function, _, inner, ..]) = (class, self.items(arguments)) {
            (class, arguments) = (called(self, function), inner);
        }
        match class {
            Class::OrderedDict if self.items(arguments).is_empty() => self.push(Value::Dict(None)),
            Class::Tensor => {
                self.tensor_of(arguments)?;
                self.push(Value::Tensor(arguments));
            }
            Class::Parameter => {
                let tensor = *self.items(arguments).first().ok_or("a parameter without a tensor")?;
                self.stack.push(tensor);
            }
            _ => self.push(Value::Unknown),
        }
        Ok(())
    }

    /// (storage, offset, shape, strides, ...).
    fn tensor_of(&self, arguments: Id) -> Result<Tensor<'a>, String> {
        let [storage, offset, shape, stride, ..] = *self.items(arguments) else {
            return Err("a tensor with too few arguments".into());
        };
        let Value::Storage(key, dtype) = self.value(storage) else {
            return Err("a tensor without a storage".into());
        };
        let number = |id: Id| match self.value(id) {
            Value::Int(value) => u64::try_from(value).map_err(|_| format!("a negative size {value}")),
            _ => Err("a size that is not an integer".to_string()),
        };
        let numbers = |id: Id| match self.items(id) {
            sizes if sizes.len() > MAX_RANK => Err(format!("a tensor of {} dimensions", sizes.len())),
            sizes => sizes.iter().map(|&size| number(size)).collect::<Result<Vec<u64>, String>>(),
        };
        let (shape, stride) = (numbers(shape)?, numbers(stride)?);
        if shape.len() != stride.len() {
            return Err(format!("shape {shape:?} with strides {stride:?}"));
        }
        let shape = shape.into_iter().map(|n| usize::try_from(n).map_err(|_| "a size that overflows".to_string()));
        let shape = shape.collect::<Result<_, _>>()?;
        Ok(Tensor { storage: self.code.text(key), dtype, offset: number(offset)?, shape, stride })
    }

    fn value(&self, id: Id) -> Value {
        self.values[id as usize]
    }

    /// The items of a tuple.
    fn items(&self, id: Id) -> &[Id] {
        match self.value(id) {
            Value::Tuple(Span { start, length }, _) => &self.items[start as usize..][..length as usize],
            _ => &[],
        }
    }

    /// A value as text, if it is one.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.value(id) {
            Value::Text(span) => Some(self.code.text(span)),
            _ => None,
        }
    }

    /// A value as a tensor, if it is one.
    ///
    /// Errors: one that cannot be.
    pub fn tensor(&self, id: Id) -> Option<Result<Tensor<'a>, String>> {
        match self.value(id) {
            Value::Tensor(arguments) => Some(self.tensor_of(arguments)),
            _ => None,
        }
    }

    /// The keys and values of a dictionary; nothing of other values.
    pub fn entries(&self, id: Id) -> &[(Id, Id)] {
        match self.value(id) {
            Value::Dict(Some(index)) => &self.dicts[index as usize].entries,
            _ => &[],
        }
    }

    /// Whether a value is a tensor or something unknown, or holds one, as far as that is known.
    pub fn holds_tensors(&self, id: Id) -> bool {
        match self.value(id) {
            Value::Tensor(_) | Value::Unknown | Value::Storage(..) => true,
            Value::Tuple(_, holds) => holds,
            Value::Dict(Some(index)) => self.dicts[index as usize].holds_tensors,
            _ => false,
        }
    }
}

/// The longest name of a tensor or storage, in bytes: every one of a million entries may have the
/// same.
const MAX_TEXT: usize = 1024;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;
