//! Codes outside of tensors, and which of them are valid.

use std::fmt;

/// A row of a codebook, or the bits of a token: bit `d` is that of channel `d`.
pub type Code = u64;

/// The most bits of a token.
pub const MAX_BITS: usize = Code::BITS as usize;

/// The set of valid codes of a tokenizer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSpace {
    /// The rows of a codebook of this size.
    Table(usize),
    /// All numbers of this many bits, 64 at most.
    Bits(usize),
}

impl fmt::Display for CodeSpace {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Table(size) => write!(f, "a codebook of {size}"),
            Self::Bits(bits) => write!(f, "{bits} bits a token"),
        }
    }
}

impl CodeSpace {
    /// Whether there is such a code.
    pub fn has(self, code: Code) -> bool {
        match self {
            Self::Table(size) => usize::try_from(code).is_ok_and(|code| code < size),
            Self::Bits(bits) => bits >= MAX_BITS || code >> bits == 0,
        }
    }

    /// Whether `codes` are those of a prefix of `scales`.
    ///
    /// Errors: more scales than there are, a scale with too few or too many codes, a code that does
    /// not exist.
    pub fn check(self, codes: &[Vec<Code>], scales: &[(usize, usize)]) -> Result<(), String> {
        if codes.len() > scales.len() {
            return Err(format!("codes of {} scales, of {} at most", codes.len(), scales.len()));
        }
        for (i, (codes, (h, w))) in codes.iter().zip(scales).enumerate() {
            if h.checked_mul(*w) != Some(codes.len()) {
                return Err(format!("scale {} ({h}x{w}) has {} codes", i + 1, codes.len()));
            }
            if let Some(code) = codes.iter().find(|&&code| !self.has(code)) {
                return Err(match self {
                    Self::Table(size) => format!("scale {} has code {code}, but there are {size} codes", i + 1),
                    Self::Bits(bits) => {
                        format!("scale {} has code {code:x} (hexadecimal) of more than {bits} bits", i + 1)
                    }
                });
            }
        }
        Ok(())
    }
}

/// The code of a token's bits, each 0 or 1, channel 0 first; 64 at most.
pub fn pack(bits: &[u8]) -> Code {
    bits.iter().rev().fold(0, |code, &bit| code << 1 | Code::from(bit & 1))
}

/// The `count` bits of a code, channel 0 first.
pub fn unpack(code: Code, count: usize) -> impl Iterator<Item = u8> {
    (0..count).map(move |d| (code >> d & 1) as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_come_back_from_codes() {
        for count in [1, 16, 20, 32, 56, 64] {
            for code in [0, 1, Code::MAX, 0x8f03_a1c2_5e77_d401].map(|code: Code| code & (Code::MAX >> (64 - count))) {
                let bits: Vec<u8> = unpack(code, count).collect();
                assert_eq!((bits.len(), pack(&bits)), (count, code));
            }
        }
        assert_eq!(pack(&[0, 1, 1]), 6);
    }

    #[test]
    fn every_number_of_so_many_bits_is_a_code() {
        let all = [vec![Code::from(u32::MAX)]];
        assert_eq!(CodeSpace::Bits(32).check(&all, &[(1, 1)]), Ok(()));
        assert!(CodeSpace::Bits(64).has(Code::MAX) && !CodeSpace::Bits(56).has(1 << 56));
        let message = CodeSpace::Bits(31).check(&all, &[(1, 1)]).unwrap_err();
        assert_eq!(message, "scale 1 has code ffffffff (hexadecimal) of more than 31 bits");
        assert!(CodeSpace::Table(7).has(6) && !CodeSpace::Table(7).has(7) && !CodeSpace::Table(7).has(Code::MAX));
    }
}
