//! Mutations of bytes and of JSON, decided by a seed.

use nextflow::rng::{Rng, Stream};
use serde_json::{Map, Value, json};

/// A stream of mutations.
pub struct Mutator {
    rng: Rng,
    counter: u64,
}

/// Integers at which arithmetic and allocations break.
const INTEGERS: [u64; 16] =
    [0, 1, 2, 7, 127, 128, 255, 256, 65_535, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX];

/// Texts at which escapes, normalisation and number parsers break.
const TEXTS: [&str; 14] = [
    "",
    " ",
    "0",
    "-1",
    "1e999",
    "NaN",
    "../../x",
    "/etc/passwd",
    "\u{0}",
    "\u{202e}x",
    "\u{fdfa}",
    "\u{1b}[2J",
    "(a+)+$",
    "\u{feff}",
];

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng::new(seed, 0, Stream::Train, 0), counter: 0 }
    }

    /// A number below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.counter += 1;
        (self.rng.bits(self.counter) % n.max(1) as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }

    /// One to eight mutations of bytes, with parts of `other` among them.
    pub fn bytes(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..1 << self.below(4) {
            let at = self.below(bytes.len() + 1);
            let end = (at + self.below(64)).min(bytes.len());
            match self.below(10) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.below(256) as u8,
                2 => drop(bytes.drain(at..end)),
                3 => bytes.truncate(at),
                4 => {
                    let part = bytes[at..end].to_vec();
                    let times = 1 << self.below(8);
                    bytes.splice(at..at, part.repeat(times));
                }
                5 => {
                    let from = self.below(other.len() + 1);
                    let part = &other[from..(from + self.below(256)).min(other.len())];
                    bytes.splice(at..end, part.iter().copied());
                }
                6 | 7 => {
                    let n = self.integer();
                    let width = 1 << self.below(4);
                    let n = if self.below(2) == 0 {
                        n.to_le_bytes()[..width].to_vec()
                    } else {
                        n.to_be_bytes()[8 - width..].to_vec()
                    };
                    let end = (at + width).min(bytes.len());
                    bytes.splice(at..end, n);
                }
                8 => {
                    let n = self.integer();
                    bytes.splice(at..end.min(at + 2), n.to_string().into_bytes());
                }
                _ => {
                    let text = self.pick(&TEXTS).as_bytes().to_vec();
                    bytes.splice(at..at, text);
                }
            }
        }
        bytes.truncate(1 << 20);
    }

    fn integer(&mut self) -> u64 {
        let n = *self.pick(&INTEGERS);
        n.wrapping_add(self.below(3) as u64).wrapping_sub(1)
    }

    /// One to eight mutations of a document.
    pub fn json(&mut self, document: &mut Value) {
        for _ in 0..1 << self.below(4) {
            let count = count(document);
            let (at, from) = (self.below(count), self.below(count));
            let donor = node(document, &mut { from }).map_or(Value::Null, |v| v.clone());
            let Some(node) = node(document, &mut { at }) else { continue };
            self.change(node, donor);
        }
    }

    /// Changes one value of a document.
    fn change(&mut self, value: &mut Value, donor: Value) {
        match self.below(8) {
            0..4 => *value = self.value(),
            4 => *value = donor,
            5 => match value {
                Value::Array(all) if !all.is_empty() => {
                    let one = all[self.below(all.len())].clone();
                    let times = 1 << self.below(10);
                    all.extend(std::iter::repeat_n(one, times));
                }
                Value::Object(all) => {
                    let name = all.keys().nth(self.below(all.len())).cloned().unwrap_or_default();
                    all.remove(&name);
                    if self.below(2) == 0 {
                        all.insert((*self.pick(&TEXTS)).into(), donor);
                    }
                }
                Value::String(text) => {
                    let times = 1 << self.below(12);
                    *text = text.repeat(times).chars().take(1 << 16).collect();
                }
                Value::Number(_) => *value = json!(self.integer()),
                _ => {}
            },
            6 => match value {
                Value::Array(all) => all.push(donor),
                Value::Object(all) => drop(all.insert((*self.pick(&TEXTS)).into(), donor)),
                other => *other = Value::Array(vec![other.take(), donor]),
            },
            _ => match value {
                Value::Array(all) => drop(all.pop()),
                Value::Number(n) => {
                    let n = n.as_f64().unwrap_or(1.0);
                    *value = json!(n * *self.pick(&[-1.0, 0.0, 0.5, 2.0, 1e9, 1e300]));
                }
                Value::String(text) => *text += *self.pick(&TEXTS),
                _ => *value = self.value(),
            },
        }
    }

    fn value(&mut self) -> Value {
        match self.below(9) {
            0 => Value::Null,
            1 => Value::Bool(self.below(2) == 0),
            2 | 3 => json!(self.integer()),
            4 => json!(-(self.below(1 << 30) as i64)),
            5 => json!(*self.pick(&[0.5, -0.5, 1e-30, 1e30, 1e308, -1e308])),
            6 => json!(*self.pick(&TEXTS)),
            7 => Value::Array((0..self.below(5)).map(|n| json!(n)).collect()),
            // Deeper than readers that recurse may go.
            _ => (0..self.below(200)).fold(Value::Object(Map::new()), |inner, _| Value::Array(vec![inner])),
        }
    }
}

/// Values of a document, itself among them.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(count).sum(),
        Value::Object(all) => all.values().map(count).sum(),
        _ => 0,
    }
}

/// The value at a place in depth-first order.
fn node<'a>(value: &'a mut Value, at: &mut usize) -> Option<&'a mut Value> {
    if *at == 0 {
        return Some(value);
    }
    *at -= 1;
    let mut find = |inner: &'a mut Value| node(inner, at);
    match value {
        Value::Array(all) => all.iter_mut().find_map(&mut find),
        Value::Object(all) => all.values_mut().find_map(&mut find),
        _ => None,
    }
}
