//! Files of codes: what `nextflow encode` writes and `nextflow decode` reads.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::input;

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// The codes of one image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Codes {
    /// Name of the model whose tokenizer they belong to.
    pub model: String,
    /// Codes of that tokenizer.
    pub codebook_size: usize,
    /// Grids (height, width) of all scales, coarse to fine; the last one gives the image's size.
    pub scales: Vec<(usize, usize)>,
    /// Row-major codes of the first scales, or of all.
    pub codes: Vec<Vec<u32>>,
}

impl Codes {
    /// Reads a file of either format, or standard input.
    ///
    /// Errors: usage, whatever is wrong with it. Whether the codes fit a model is told by [`Codes::check`].
    pub fn read(path: &Path) -> Result<Self> {
        const HINT: &str = "nextflow encode IMAGE -o codes.json makes one";
        let bad = |what: String| Error::usage(format!("{} {what}", input::shown(path))).hint(HINT);
        if path.is_dir() {
            return Err(bad("is a folder".into()));
        }
        let bytes = input::piped(path, MAX_BYTES, HINT)?;
        let json = input::without_bom(&bytes);
        match json.trim_ascii_start().first() {
            Some(b'{') => serde_json::from_slice(json).map_err(|e| bad(format!("is not a file of codes: {e}"))),
            _ => Self::from_safetensors(&bytes).map_err(|what| bad(format!("is not a file of codes: {what}"))),
        }
    }

    /// One line of JSON.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec(self).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        json.push(b'\n');
        Ok(json)
    }

    /// A safetensors file with u32 tensors `scale.00` (h, w), `scale.01`, ... and the rest as metadata.
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let tensors =
            self.codes.iter().zip(&self.scales).enumerate().map(|(i, (codes, grid))| {
                Ok((format!("scale.{i:02}"), Tensor::from_slice(codes, *grid, &Device::Cpu)?))
            });
        let tensors: BTreeMap<String, Tensor> = tensors.collect::<candle_core::Result<_>>()?;
        let scales = serde_json::to_string(&self.scales).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        let metadata = HashMap::from([
            ("model".to_string(), self.model.clone()),
            ("codebook_size".to_string(), self.codebook_size.to_string()),
            ("scales".to_string(), scales),
        ]);
        Ok(safetensors::serialize(tensors, Some(metadata)).map_err(|e| candle_core::Error::Msg(e.to_string()))?)
    }

    fn from_safetensors(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let get = |key: &str| metadata.get(key).ok_or_else(|| format!("no {key} in its metadata"));
        let scales: Vec<(usize, usize)> = serde_json::from_str(get("scales")?).map_err(|e| format!("scales: {e}"))?;
        let codes = (0..file.len()).zip(&scales).map(|(i, &(h, w))| {
            let name = format!("scale.{i:02}");
            let tensor = file.tensor(&name).map_err(|_| format!("no {name}"))?;
            if tensor.dtype() != safetensors::Dtype::U32 || tensor.shape() != [h, w] {
                return Err(format!("{name} is {} {:?}, not U32 {:?}", tensor.dtype(), tensor.shape(), [h, w]));
            }
            Ok(tensor.data().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect())
        });
        Ok(Self {
            model: get("model")?.clone(),
            codebook_size: get("codebook_size")?.parse().map_err(|e| format!("codebook_size: {e}"))?,
            codes: codes.collect::<Result<_, String>>()?,
            scales,
        })
    }

    /// Whether `codec` can decode them.
    ///
    /// Errors: usage, with what does not fit.
    pub fn check(&self, codec: &Codec) -> Result<()> {
        let bad = |what: String| Error::usage(what).hint("nextflow encode IMAGE -o codes.json makes codes that fit");
        let (name, size) = (&codec.name, codec.config().codebook.size);
        if self.codebook_size != size {
            let what =
                format!("codes of {} for a codebook of {}, but {} has {size}", self.model, self.codebook_size, name);
            return Err(bad(what));
        }
        if !codec.has_scales(&self.scales) {
            return Err(bad(format!("{} has no schedule with the scales {:?}", name, self.scales)));
        }
        if self.codes.is_empty() {
            return Err(bad("codes of no scale".into()));
        }
        codec.config().codebook.check(&self.codes, &self.scales).map_err(bad)
    }
}
