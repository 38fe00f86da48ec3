//! The network of candle-transformers, on our checked weights: plain ones, or blocks as GGUF.

use std::fmt;
use std::io::Cursor;

use candle_core::quantized::{QTensor, gguf_file};
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor, bail};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_transformers::models::quantized_t5;
use candle_transformers::models::t5::{Config, T5EncoderModel};

use super::{TEXT_ENCODER, read_config};
use crate::checkpoint::{self, Init, Matrices, Source, WeightType, Weights};
use crate::error::Result;
use crate::ops::WeightMatrix;

/// The network alone.
#[derive(Debug)]
pub struct Encoder {
    network: Network,
    device: Device,
}

enum Network {
    /// Weights of 16 or 32 bits; activations are f32.
    Plain(Box<T5EncoderModel>),
    /// Weights in blocks: encoder and decoder, of which the decoder has no layers.
    Blocks(Box<quantized_t5::T5ForConditionalGeneration>),
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(if matches!(self, Self::Plain(_)) { "Plain" } else { "Blocks" })
    }
}

/// Our weights as a backend of candle-nn's.
struct Checked(Weights);

impl SimpleBackend for Checked {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, _: DType, _: &Device) -> CandleResult<Tensor> {
        let fan_in = |columns: usize| Init::Normal { std: (columns as f64).powf(-0.5) };
        match *shape.dims() {
            // The table of distances is small and adds to the logits of every block: it is never
            // quantised.
            [rows, columns] if !name.contains(DISTANCES) => {
                match self.0.matrix((rows, columns), name, fan_in(columns))? {
                    WeightMatrix::Dense(weight) => Ok(weight),
                    _ => bail!("{name}: weights in blocks are read as GGUF"),
                }
            }
            [_] => self.0.get(shape, name, Init::Ones),
            _ => self.0.get(shape, name, fan_in(1)),
        }
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> CandleResult<Tensor> {
        bail!("{name}: a tensor without a shape is not read")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        name == "shared.weight"
    }
}

const DISTANCES: &str = "relative_attention_bias";

/// The network on weights of 16 or 32 bits.
pub(super) fn plain(w: &Weights, config: &Config) -> CandleResult<T5EncoderModel> {
    let device = w.device().clone();
    T5EncoderModel::load(VarBuilder::from_backend(Box::new(Checked(w.clone())), DType::F32, device), config)
}

/// Loads the tensors of an encoder from an inventory, as in our GGUF files or in others.
pub fn ask(w: &Weights, config: &Config, gguf: bool) -> CandleResult<()> {
    if gguf { ask_for_blocks(w, config) } else { plain(w, config).map(drop) }
}

/// Loads the tensors of a quantised encoder: its decoder, which has no layers here, adds a norm.
pub(super) fn ask_for_blocks(w: &Weights, config: &Config) -> CandleResult<()> {
    plain(w, config)?;
    w.get(config.d_model, &format!("decoder.{LAST_NORM}"), Init::Ones).map(drop)
}

const LAST_NORM: &str = "final_layer_norm.weight";

/// The network on weights in blocks. candle-transformers has quantised encoders with a decoder
/// only: one without layers.
fn quantised(
    weights: quantized_t5::VarBuilder,
    config: &Config,
) -> CandleResult<Box<quantized_t5::T5ForConditionalGeneration>> {
    let config = serde_json::json!({
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_decoder_layers": 0,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "dropout_rate": 0.0,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_factor": 1.0,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": true,
        "is_encoder_decoder": true,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
    });
    let config = serde_json::from_value(config).map_err(candle_core::Error::msg)?;
    quantized_t5::T5ForConditionalGeneration::load(weights, &config).map(Box::new)
}

/// Whether weights of this type are blocks of less than 16 bits a number.
pub fn is_small(weights: WeightType) -> bool {
    matches!(weights, WeightType::Q8_0 | WeightType::Q4_0 | WeightType::Q4K)
}

/// The type of tensors that are not blocks.
pub fn dtype(weights: Option<WeightType>) -> DType {
    match weights {
        Some(WeightType::Bf16) => DType::BF16,
        Some(WeightType::F16) => DType::F16,
        _ => DType::F32,
    }
}

/// The content of the encoder's GGUF file; `tensors` makes the tensors of an inventory.
fn gguf_tensors(
    config: &Config,
    tensors: impl FnOnce(&Weights) -> Result<Vec<(String, QTensor)>>,
) -> Result<Vec<(String, QTensor)>> {
    let requested = Weights::inventory();
    plain(&requested, config)?;
    let mut tensors = tensors(&requested)?;
    let own = format!("encoder.{LAST_NORM}");
    if let Some((_, norm)) = tensors.iter().find(|(key, _)| *key == own) {
        let norm = QTensor::quantize(&norm.dequantize(&Device::Cpu)?, norm.dtype())?;
        tensors.push((format!("decoder.{LAST_NORM}"), norm));
    }
    Ok(tensors)
}

/// The encoder at `source` in blocks of `weights`, as a GGUF file holds it.
///
/// Errors: weights that do not fit their config.
pub fn blocks(source: &Source, weights: WeightType) -> Result<Vec<(String, QTensor)>> {
    gguf_tensors(&read_config(source)?, |requested| checkpoint::blocks(source, TEXT_ENCODER, requested, weights))
}

/// A file of these tensors in memory, for candle-transformers takes nothing else.
fn in_memory(tensors: Vec<(String, QTensor)>, device: &Device) -> CandleResult<quantized_t5::VarBuilder> {
    let mut file = Cursor::new(Vec::new());
    let pairs: Vec<(&str, &QTensor)> = tensors.iter().map(|(key, tensor)| (key.as_str(), tensor)).collect();
    gguf_file::write(&mut file, &[], &pairs)?;
    drop(tensors);
    quantized_t5::VarBuilder::from_gguf_buffer(file.get_ref(), device)
}

impl Encoder {
    pub(super) fn load(source: &Source, config: &Config, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let network = match weights.filter(|weights| is_small(*weights)) {
            Some(weights) if !source.is_gguf(TEXT_ENCODER) => {
                Network::Blocks(quantised(in_memory(blocks(source, weights)?, device)?, config)?)
            }
            _ => match source.gguf(TEXT_ENCODER) {
                Some(file) => {
                    source.check(TEXT_ENCODER, |w| ask_for_blocks(w, config))?;
                    Network::Blocks(quantised(quantized_t5::VarBuilder::from_gguf(file, device)?, config)?)
                }
                None => {
                    let build = |w: &Weights| plain(w, config);
                    Network::Plain(Box::new(source.load(TEXT_ENCODER, dtype(weights), device, build)?))
                }
            },
        };
        Ok(Self { network, device: device.clone() })
    }

    /// One with random weights.
    pub fn synthetic(config: &Config, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let network = match weights.filter(|weights| is_small(*weights)).and_then(WeightType::blocks) {
            Some(blocks) => {
                let random = Weights::synthetic(DType::F32, &Device::Cpu).with_matrices(Matrices::Blocks(blocks));
                let tensors = gguf_tensors(config, |requested| Ok(random.all_blocks(requested)?))?;
                Network::Blocks(quantised(in_memory(tensors, device)?, config)?)
            }
            None => Network::Plain(Box::new(plain(&Weights::synthetic(dtype(weights), device), config)?)),
        };
        Ok(Self { network, device: device.clone() })
    }

    /// Features of the tokens of a text, (tokens, d_model) in f32.
    pub fn forward(&mut self, ids: &[u32]) -> CandleResult<Tensor> {
        let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
        match &mut self.network {
            Network::Plain(model) => model.forward_dt(&ids, Some(DType::F32))?.squeeze(0),
            Network::Blocks(model) => model.encode(&ids)?.squeeze(0),
        }
    }
}
