//! Files of codes: what `nextflow encode` writes and `nextflow decode` reads.

mod tokenizer_source;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

pub use tokenizer_source::{TokenizerSource, nearest};

use crate::error::{Error, Result};
use crate::generate::ImageCodes;
use crate::io::input;
use crate::tokenizer::{Code, CodeSpace, pack, unpack};

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// The codes of one image.
#[derive(Clone, Debug, PartialEq)]
pub struct CodeFile {
    /// Name of the model whose tokenizer they belong to.
    pub model: String,
    /// CodeFile of that tokenizer.
    pub space: CodeSpace,
    /// Grids (height, width) of all scales, coarse to fine; the last one gives the image's size.
    pub scales: Vec<(usize, usize)>,
    /// Row-major codes of the first scales, or of all.
    pub codes: ImageCodes,
}

/// The JSON form. Table codes are numbers; bitwise codes are one string of hexadecimal digits per
/// token, most significant first, because many JSON readers keep only 53 bits of a number.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Json {
    model: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    codebook_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bits: Option<usize>,
    scales: Vec<(usize, usize)>,
    codes: Vec<Vec<JsonCode>>,
}

/// A code as JSON has it.
enum JsonCode {
    Number(Code),
    /// With this many digits.
    Digits(Code, usize),
}

impl Serialize for JsonCode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Self::Number(code) => serializer.serialize_u64(code),
            Self::Digits(code, digits) => serializer.collect_str(&format_args!("{code:0digits$x}")),
        }
    }
}

impl<'de> Deserialize<'de> for JsonCode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = JsonCode;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a code: a number, or 1 to 16 hexadecimal digits as a string")
            }

            fn visit_u64<E: de::Error>(self, code: u64) -> Result<JsonCode, E> {
                Ok(JsonCode::Number(code))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<JsonCode, E> {
                let digits = |text: &&str| text.len() <= 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
                let code = Some(text).filter(digits);
                let code = code.and_then(|text| Code::from_str_radix(text, 16).ok());
                code.map(|code| JsonCode::Digits(code, text.len()))
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Reader)
    }
}

impl Json {
    fn of(codes: &CodeFile) -> Self {
        let (codebook_size, bits) = match codes.space {
            CodeSpace::Table(size) => (Some(size), None),
            CodeSpace::Bits(bits) => (None, Some(bits)),
        };
        let json = |&code: &Code| match bits {
            None => JsonCode::Number(code),
            Some(bits) => JsonCode::Digits(code, bits.div_ceil(4)),
        };
        let (model, scales) = (codes.model.clone(), codes.scales.clone());
        let codes = codes.codes.iter().map(|codes| codes.iter().map(json).collect()).collect();
        Self { model, codebook_size, bits, scales, codes }
    }

    fn codes(self) -> Result<CodeFile, String> {
        let space = space(self.codebook_size, self.bits)?;
        let code = |code: JsonCode| match (code, space) {
            (JsonCode::Number(code), CodeSpace::Table(_)) | (JsonCode::Digits(code, _), CodeSpace::Bits(_)) => Ok(code),
            (JsonCode::Number(code), _) => Err(format!("code {code} is a number, not a string of hexadecimal digits")),
            (JsonCode::Digits(..), _) => Err("a code is a string, not a number".to_string()),
        };
        let codes = self.codes.into_iter().map(|codes| codes.into_iter().map(code).collect());
        let codes = codes.collect::<Result<_, String>>()?;
        Ok(CodeFile { model: self.model, space, scales: self.scales, codes })
    }
}

/// The code space that a file declares.
fn space(codebook_size: Option<usize>, bits: Option<usize>) -> Result<CodeSpace, String> {
    match (codebook_size, bits) {
        (Some(size), None) => Ok(CodeSpace::Table(size)),
        (None, Some(bits)) => Ok(CodeSpace::Bits(bits)),
        _ => Err("either codebook_size or bits is needed".into()),
    }
}

impl CodeFile {
    /// Reads a file of either format, or standard input.
    ///
    /// Errors: usage, for a broken file. [`CodeFile::check`] checks that the codes fit a model.
    pub fn read(path: &Path) -> Result<Self> {
        const HINT: &str = "nextflow encode IMAGE -o codes.json makes one";
        let bad = |what: String| Error::usage(format!("{} {what}", input::shown(path))).hint(HINT);
        if path.is_dir() {
            return Err(bad("is a folder".into()));
        }
        let mut bytes = input::piped(path, MAX_BYTES, HINT)?;
        // PowerShell redirects as UTF-16. Without the byte order mark it could be a safetensors
        // file.
        if bytes.starts_with(b"\xff\xfe") {
            bytes = input::utf8(bytes);
        }
        let json = input::without_bom(&bytes);
        let codes = match json.trim_ascii_start().first() {
            Some(b'{') => serde_json::from_slice::<Json>(json).map_err(|e| e.to_string()).and_then(Json::codes),
            _ => Self::from_safetensors(&bytes),
        };
        codes.map_err(|what| bad(format!("is not a file of codes: {what}")))
    }

    /// One line of JSON.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec(&Json::of(self)).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        json.push(b'\n');
        Ok(json)
    }

    /// A safetensors file with tensors `scale.00`, `scale.01`, ..., u32 (h, w) of a table or u8 (h,
    /// w, bits) of bits, and the rest as metadata.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let tensor = |codes: &[Code], (h, w): (usize, usize)| match self.space {
            CodeSpace::Table(_) => {
                let rows: Vec<u32> = codes.iter().map(|&code| code as u32).collect();
                Tensor::from_vec(rows, (h, w), &Device::Cpu)
            }
            CodeSpace::Bits(bits) => {
                let all: Vec<u8> = codes.iter().flat_map(|&code| unpack(code, bits)).collect();
                Tensor::from_vec(all, (h, w, bits), &Device::Cpu)
            }
        };
        let scales = self.codes.iter().zip(&self.scales).enumerate();
        let tensors = scales.map(|(i, (codes, &grid))| Ok((format!("scale.{i:02}"), tensor(codes, grid)?)));
        let tensors: BTreeMap<String, Tensor> = tensors.collect::<candle_core::Result<_>>()?;
        let scales = serde_json::to_string(&self.scales).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        let (key, size) = match self.space {
            CodeSpace::Table(size) => ("codebook_size", size),
            CodeSpace::Bits(bits) => ("bits", bits),
        };
        let metadata = HashMap::from([
            ("model".to_string(), self.model.clone()),
            (key.to_string(), size.to_string()),
            ("scales".to_string(), scales),
        ]);
        Ok(safetensors::serialize(tensors, Some(metadata)).map_err(|e| candle_core::Error::Msg(e.to_string()))?)
    }

    fn from_safetensors(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let get = |key: &str| metadata.get(key).ok_or_else(|| format!("no {key} in its metadata"));
        let number = |key: &str| {
            metadata.get(key).map(|text| text.parse::<usize>().map_err(|e| format!("{key}: {e}"))).transpose()
        };
        let (model, space) = (get("model")?.clone(), space(number("codebook_size")?, number("bits")?)?);
        let scales: Vec<(usize, usize)> = serde_json::from_str(get("scales")?).map_err(|e| format!("scales: {e}"))?;
        let codes = (0..file.len()).zip(&scales).map(|(i, &(h, w))| {
            let name = format!("scale.{i:02}");
            let tensor = file.tensor(&name).map_err(|_| format!("no {name}"))?;
            let (dtype, shape) = match space {
                CodeSpace::Table(_) => (Dtype::U32, vec![h, w]),
                CodeSpace::Bits(bits) => (Dtype::U8, vec![h, w, bits]),
            };
            if tensor.dtype() != dtype || tensor.shape() != shape {
                return Err(format!("{name} is {} {:?}, not {dtype} {shape:?}", tensor.dtype(), tensor.shape()));
            }
            let data = tensor.data();
            match space {
                CodeSpace::Table(_) => {
                    Ok(data.as_chunks().0.iter().map(|&b| Code::from(u32::from_le_bytes(b))).collect())
                }
                CodeSpace::Bits(bits) if (1..=64).contains(&bits) && data.iter().all(|&bit| bit < 2) => {
                    Ok(data.chunks_exact(bits).map(pack).collect())
                }
                CodeSpace::Bits(_) => Err(format!("{name} has other bits than 0 and 1, or more than 64 of a token")),
            }
        });
        Ok(Self { model, space, codes: codes.collect::<Result<_, String>>()?, scales })
    }

    /// Whether `codec` can decode them.
    ///
    /// Errors: usage, with what does not fit.
    pub fn check(&self, codec: &TokenizerSource) -> Result<()> {
        let bad = |what: String| Error::usage(what).hint("nextflow encode IMAGE -o codes.json makes codes that fit");
        let (name, space) = (&codec.name, codec.space());
        if self.space != space {
            let has = match (self.space, space) {
                (CodeSpace::Table(_), CodeSpace::Table(size)) => size.to_string(),
                _ => space.to_string(),
            };
            return Err(bad(format!("codes of {} for {}, but {name} has {has}", self.model, self.space)));
        }
        if !codec.has_scales(&self.scales) {
            return Err(bad(format!("{name} has no schedule with the scales {:?}", self.scales)));
        }
        if self.codes.is_empty() {
            return Err(bad("codes of no scale".into()));
        }
        space.check(&self.codes, &self.scales).map_err(bad)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(bits: usize, codes: ImageCodes) -> CodeFile {
        let scales = vec![(1, 1), (1, 2), (3, 3)];
        CodeFile { model: "x".into(), space: CodeSpace::Bits(bits), scales, codes }
    }

    fn read(bytes: &[u8]) -> Result<CodeFile, String> {
        match bytes[0] {
            b'{' => serde_json::from_slice::<Json>(bytes).map_err(|e| e.to_string()).and_then(Json::codes),
            _ => CodeFile::from_safetensors(bytes),
        }
    }

    #[test]
    fn bits_survive_both_formats() {
        for (count, code) in
            [(12, 0xabc), (16, 0xffff), (20, 1), (32, Code::from(u32::MAX)), (56, (1 << 56) - 2), (64, Code::MAX)]
        {
            let codes = bits(count, vec![vec![code], vec![0, 1]]);
            assert_eq!(read(&codes.to_json().unwrap()).unwrap(), codes);
            assert_eq!(read(&codes.to_safetensors().unwrap()).unwrap(), codes);
        }
        let json = bits(20, vec![vec![0xab], vec![0, 0xf_ffff]]).to_json().unwrap();
        let text = r#"{"model":"x","bits":20,"scales":[[1,1],[1,2],[3,3]],"codes":[["000ab"],["00000","fffff"]]}"#;
        assert_eq!(String::from_utf8(json).unwrap(), format!("{text}\n"));
    }

    #[test]
    fn what_is_no_code_is_refused() {
        let json = |space: &str, code: &str| {
            read(format!(r#"{{"model":"x",{space},"scales":[[1,1]],"codes":[[{code}]]}}"#).as_bytes()).unwrap_err()
        };
        for code in [r#""""#, r#""+1""#, r#""0x1""#, r#""00000000000000001""#, "-1", "1.5", "null", "[]"] {
            assert!(json(r#""bits":32"#, code).contains("a number, or 1 to 16 hexadecimal digits"), "{code}");
        }
        assert!(json(r#""bits":32"#, "7").contains("code 7 is a number"));
        assert!(json(r#""codebook_size":32"#, r#""7""#).contains("is a string"));
        for space in [r#""bits":32,"codebook_size":7"#, r#""bits":null"#] {
            assert!(json(space, "7").contains("either codebook_size or bits"));
        }
        let mut file = bits(8, vec![vec![0]]).to_safetensors().unwrap();
        *file.last_mut().unwrap() = 2;
        assert!(read(&file).unwrap_err().contains("other bits than 0 and 1"));
    }
}
