//! The bytes of a pickle, instruction by instruction.

use super::opcode::*;

/// A pickle, and how far it has been read.
pub(super) struct Code<'a> {
    pickle: &'a [u8],
    /// The next byte.
    pub at: usize,
}

/// Bytes of the pickle.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub start: u32,
    pub length: u32,
}

impl<'a> Code<'a> {
    /// From the beginning on.
    pub fn new(pickle: &'a [u8]) -> Self {
        Self { pickle, at: 0 }
    }

    /// Bytes that are known to be text.
    pub fn text(&self, Span { start, length }: Span) -> &'a str {
        std::str::from_utf8(&self.pickle[start as usize..][..length as usize]).unwrap_or_default()
    }

    pub fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let taken = self.pickle[self.at..].get(..n).ok_or("it ends in the middle of an instruction")?;
        self.at += n;
        Ok(taken)
    }

    pub fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        self.take(N)?.try_into().map_err(|_| "it ends in the middle of an instruction".into())
    }

    /// The key of a value in the memo, of one byte or four.
    pub fn memo_key(&mut self, short: bool) -> Result<u32, String> {
        if short { self.byte().map(u32::from) } else { self.array().map(u32::from_le_bytes) }
    }

    /// The length before text or bytes, of the instruction's width.
    pub fn length(&mut self, op: u8) -> Result<usize, String> {
        let length = match op {
            SHORT_BINUNICODE | SHORT_BINSTRING | SHORT_BINBYTES => self.byte()?.into(),
            BINUNICODE8 | BINBYTES8 | BYTEARRAY8 => u64::from_le_bytes(self.array()?),
            _ => u32::from_le_bytes(self.array()?).into(),
        };
        usize::try_from(length).map_err(|_| "a length that overflows".into())
    }

    pub fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.pickle[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or("a line without an end")?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| "a name that is not UTF-8".into())
    }

    /// A little-endian integer of any size, none if it has more than 64 bits.
    pub fn long(&mut self, op: u8) -> Result<Option<i64>, String> {
        let length = match op {
            LONG1 => self.byte()?.into(),
            _ => u32::from_le_bytes(self.array()?) as usize,
        };
        let bytes = self.take(length)?;
        let negative = bytes.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        Ok(wide.get_mut(..length).map(|low| low.copy_from_slice(bytes)).map(|()| i64::from_le_bytes(wide)))
    }
}
