//! T5's encoder, with which Infinity reads prompts: the network is candle-transformers', its weights come from our checked files.

use std::fmt;
use std::io::Cursor;

use candle_core::quantized::{QTensor, gguf_file};
use candle_core::{DType, Device, Result as CandleResult, Shape, Tensor, bail};
use candle_nn::var_builder::{SimpleBackend, VarBuilder};
use candle_transformers::models::quantized_t5;
use candle_transformers::models::t5::{Config, T5EncoderModel};

use crate::checkpoint::{self, Init, Matrices, Source, WeightType, Weights};
use crate::error::{Error, Result};
use crate::nn::MAX_LAYERS;
use crate::ops::WeightMatrix;
use crate::text::Text;

/// The file of the encoder's weights in a model folder.
pub const TEXT_ENCODER: &str = "text_encoder/model.safetensors";
/// The file of its shape.
pub const TEXT_CONFIG: &str = "text_encoder/config.json";
/// The file of its words.
pub const TEXT_WORDS: &str = "text_encoder/tokenizer.json";

/// The most tokens of a prompt, `</s>` among them: the rest is cut off, as the reference does.
pub const MAX_WORDS: usize = 512;

/// A loaded encoder with its words. It is needed before anything is drawn, and can be dropped then.
#[derive(Debug)]
pub struct TextEncoder {
    words: Words,
    encoder: Encoder,
}

/// The network alone.
#[derive(Debug)]
pub struct Encoder {
    network: Network,
    device: Device,
}

enum Network {
    /// Weights of 16 or 32 bits; what is computed is f32.
    Plain(Box<T5EncoderModel>),
    /// Weights in blocks: encoder and decoder, of which the decoder has no layers.
    Blocks(Box<quantized_t5::T5ForConditionalGeneration>),
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(if matches!(self, Self::Plain(_)) { "Plain" } else { "Blocks" })
    }
}

/// The words of a prompt.
#[derive(Debug)]
struct Words {
    text: Text,
    /// `</s>`.
    end: u32,
}

impl Words {
    fn read(source: &Source, config: &Config) -> Result<Self> {
        let text = Text::from_unigram(&source.bytes(TEXT_WORDS)?)
            .map_err(|e| Error { message: format!("{} (of {source})", e.message), ..e })?;
        match text.vocab_size() {
            more if more > config.vocab_size => {
                let message = format!("{TEXT_WORDS} of {source} has {more} words, the encoder {}", config.vocab_size);
                Err(Error::model(message).hint("copy tokenizer.json and config.json of google/flan-t5-xl again"))
            }
            _ => Ok(Self { text, end: config.eos_token_id as u32 }),
        }
    }

    /// The ids of a prompt and `</s>`, at most [`MAX_WORDS`].
    fn ids(&self, prompt: &str) -> Result<Vec<u32>> {
        let mut ids = self.text.encode(prompt)?;
        ids.truncate(MAX_WORDS - 1);
        ids.push(self.end);
        Ok(ids)
    }
}

/// Shape of an encoder, as its `config.json` has it.
///
/// Errors: one that is not T5's.
pub fn read_config(source: &Source) -> Result<Config> {
    let value = source.read_json(TEXT_CONFIG)?;
    let bad = |what: String| {
        Error::model(format!("{TEXT_CONFIG} of {source}: {what}")).hint("copy config.json of google/flan-t5-xl again")
    };
    let config: Config = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
    check(&config).map_err(bad)?;
    Ok(config)
}

/// What would make the network panic, as one sentence.
fn check(config: &Config) -> std::result::Result<(), String> {
    const MOST: usize = 1 << 20;
    let sizes = [config.vocab_size, config.d_model, config.d_kv, config.d_ff, config.num_heads];
    if !(1..=MAX_LAYERS).contains(&config.num_layers) || !sizes.iter().all(|n| (1..=MOST).contains(n)) {
        return Err("its sizes are those of no encoder".into());
    }
    if config.feed_forward_proj != flan_t5_xl().feed_forward_proj {
        return Err("feed_forward_proj is not gated-gelu".into());
    }
    let (buckets, distance) = (config.relative_attention_num_buckets, config.relative_attention_max_distance);
    if !(4..=MOST).contains(&buckets) || !(buckets / 4 + 1..=MOST).contains(&distance) {
        return Err(format!("{buckets} buckets for a distance of {distance}"));
    }
    if config.eos_token_id >= config.vocab_size {
        return Err(format!("eos_token_id {} of {} words", config.eos_token_id, config.vocab_size));
    }
    Ok(())
}

/// flan-t5-xl's shape.
pub fn flan_t5_xl() -> Config {
    let gated = candle_transformers::models::t5::ActivationWithOptionalGating {
        gated: true,
        activation: candle_nn::Activation::NewGelu,
    };
    Config {
        vocab_size: 32_128,
        d_model: 2048,
        d_kv: 64,
        d_ff: 5120,
        num_layers: 24,
        num_heads: 32,
        layer_norm_epsilon: 1e-6,
        feed_forward_proj: gated,
        tie_word_embeddings: false,
        ..Config::default()
    }
}

/// Our weights in the place of candle-nn's own files.
struct Checked(Weights);

impl SimpleBackend for Checked {
    fn get(&self, shape: Shape, name: &str, _: candle_nn::Init, _: DType, _: &Device) -> CandleResult<Tensor> {
        let fan_in = |columns: usize| Init::Normal { std: (columns as f64).powf(-0.5) };
        match *shape.dims() {
            // The table of distances is small and adds to the logits of every block: it is never quantised.
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
fn plain(w: &Weights, config: &Config) -> CandleResult<T5EncoderModel> {
    let device = w.device().clone();
    T5EncoderModel::load(VarBuilder::from_backend(Box::new(Checked(w.clone())), DType::F32, device), config)
}

/// Asks an inventory for the tensors of an encoder, in a GGUF file of ours or in others.
pub fn ask(w: &Weights, config: &Config, gguf: bool) -> CandleResult<()> {
    if gguf { ask_for_blocks(w, config) } else { plain(w, config).map(drop) }
}

/// Asks for what an encoder of blocks has: its decoder, which has no layers here, brings a norm.
fn ask_for_blocks(w: &Weights, config: &Config) -> CandleResult<()> {
    plain(w, config)?;
    w.get(config.d_model, &format!("decoder.{LAST_NORM}"), Init::Ones).map(drop)
}

const LAST_NORM: &str = "final_layer_norm.weight";

/// The network on weights in blocks. candle-transformers has quantised encoders with a decoder only: one without layers.
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
    matches!(weights, WeightType::Q8_0 | WeightType::Q4K)
}

/// How tensors are kept that are no such blocks.
pub fn dtype(weights: Option<WeightType>) -> DType {
    match weights {
        Some(WeightType::Bf16) => DType::BF16,
        Some(WeightType::F16) => DType::F16,
        _ => DType::F32,
    }
}

/// What a GGUF file of the encoder holds, of which `tensor` makes every tensor that is asked for.
fn gguf_tensors(
    config: &Config,
    tensors: impl FnOnce(&Weights) -> Result<Vec<(String, QTensor)>>,
) -> Result<Vec<(String, QTensor)>> {
    let asked = Weights::inventory();
    plain(&asked, config)?;
    let mut tensors = tensors(&asked)?;
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
    gguf_tensors(&read_config(source)?, |asked| checkpoint::blocks(source, TEXT_ENCODER, asked, weights))
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
    fn load(source: &Source, config: &Config, device: &Device, weights: Option<WeightType>) -> Result<Self> {
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
                let tensors = gguf_tensors(config, |asked| Ok(random.all_blocks(asked)?))?;
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

impl TextEncoder {
    /// Whether [`TextEncoder::load`] can load what is there, as far as words and headers tell.
    ///
    /// Errors: those of [`TextEncoder::load`].
    pub fn check(source: &Source) -> Result<()> {
        let config = read_config(source)?;
        Words::read(source, &config)?;
        match source.is_gguf(TEXT_ENCODER) {
            true => source.check(TEXT_ENCODER, |w| ask_for_blocks(w, &config)),
            false => source.check(TEXT_ENCODER, |w| plain(w, &config).map(drop)),
        }
    }

    /// The words of the encoder at `source`.
    ///
    /// Errors: files that are missing or broken.
    pub fn text(source: &Source) -> Result<Text> {
        Ok(Words::read(source, &read_config(source)?)?.text)
    }

    /// How many words the encoder at `source` knows.
    ///
    /// Errors: files that are missing or broken.
    pub fn words(source: &Source) -> Result<usize> {
        Ok(Words::read(source, &read_config(source)?)?.text.vocab_size())
    }

    /// Loads the encoder and its words onto `device`, with matrices in f32 or as `weights`; a GGUF file stays what it is. What is
    /// computed is f32 in any case.
    ///
    /// Errors: files that are missing, broken, or do not fit.
    pub fn load(source: &Source, device: &Device, weights: Option<WeightType>) -> Result<Self> {
        let config = read_config(source)?;
        let words = Words::read(source, &config)?;
        Ok(Self { words, encoder: Encoder::load(source, &config, device, weights)? })
    }

    /// Features of a prompt, (tokens, d_model) in f32: one for every token, and for `</s>`.
    pub fn encode(&mut self, prompt: &str) -> Result<Tensor> {
        Ok(self.encoder.forward(&self.words.ids(prompt)?)?)
    }
}

/// Bytes that encoding a prompt of so many tokens takes, with the weights loaded as [`TextEncoder::load`] does; `gguf` says that
/// they are a GGUF file's.
pub fn memory(config: &Config, weights: Option<WeightType>, gguf: Option<u64>, words: usize) -> Result<u64> {
    let asked = Weights::inventory();
    plain(&asked, config)?;
    let (inner, f32s) = (config.num_heads * config.d_kv, 4);
    let table = (config.vocab_size * config.d_model * f32s) as u64;
    let kept = match (gguf, weights.and_then(WeightType::blocks).filter(|_| weights.is_some_and(is_small))) {
        (Some(bytes), _) => bytes + table,
        // The file in memory, and what is made of it.
        (None, Some(blocks)) => 2 * asked.bytes(DType::F32, Matrices::Blocks(blocks)) + table,
        (None, None) => {
            // Of 16 bits, every matrix becomes f32 when it is needed.
            let at_once = if dtype(weights) == DType::F32 { 0 } else { 2 * config.d_ff * config.d_model * f32s };
            asked.bytes(dtype(weights), Matrices::Tensors) + at_once as u64
        }
    };
    let block = words * (3 * config.d_ff + 4 * inner + 4 * config.d_model) + 4 * config.num_heads * words * words;
    Ok(kept + (block * f32s) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/infinity"))
    }

    /// The golden encoder as a model folder, without words.
    fn source() -> (tempfile::TempDir, Source) {
        let place = tempfile::tempdir().unwrap();
        let text = place.path().join("text_encoder");
        std::fs::create_dir(&text).unwrap();
        std::fs::copy(folder().join("t5_config.json"), text.join("config.json")).unwrap();
        std::fs::copy(folder().join("t5_tiny.weights.safetensors"), text.join("model.safetensors")).unwrap();
        let source = Source::Folder(place.path().into());
        (place, source)
    }

    fn golden() -> std::collections::HashMap<String, Tensor> {
        candle_core::safetensors::load(folder().join("t5_tiny.io.safetensors"), &Device::Cpu).unwrap()
    }

    fn ids(t: &Tensor) -> Vec<u32> {
        t.to_dtype(DType::U32).unwrap().to_vec1().unwrap()
    }

    fn far(got: &Tensor, want: &Tensor) -> f32 {
        assert_eq!(got.dims(), want.dims());
        (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar().unwrap()
    }

    /// How far an encoder is off the golden features.
    fn errors(weights: Option<WeightType>) -> Vec<f32> {
        let (_place, source) = source();
        let mut encoder = Encoder::load(&source, &read_config(&source).unwrap(), &Device::Cpu, weights).unwrap();
        let golden = golden();
        let mut texts: Vec<String> =
            golden.keys().filter_map(|key| key.strip_prefix("ids.")).map(String::from).collect();
        texts.sort();
        assert!(texts.len() >= 2);
        let short = |i: &String| {
            far(&encoder.forward(&ids(&golden[&format!("ids.{i}")])).unwrap(), &golden[&format!("features.{i}")])
        };
        let mut errors: Vec<f32> = texts.iter().map(short).collect();
        // 512 tokens, of which every 16th is compared.
        let long = encoder.forward(&ids(&golden["long_ids"])).unwrap();
        let want = &golden["long_features_every_16th"];
        let step = long.dim(0).unwrap() / want.dim(0).unwrap();
        let rows: Vec<u32> = (0..want.dim(0).unwrap()).map(|i| (i * step) as u32).collect();
        let rows = Tensor::new(rows, &Device::Cpu).unwrap();
        errors.push(far(&long.index_select(&rows, 0).unwrap(), want));
        errors
    }

    #[test]
    fn features_equal_the_reference() {
        for error in errors(None) {
            assert!(error < 2e-5, "{error}");
        }
    }

    #[test]
    fn smaller_weights_give_nearly_the_same() {
        // Features are about 1 in size, and so are the largest errors of 8 bits among many at these widths.
        for (weights, most) in [(WeightType::Bf16, 0.05), (WeightType::F16, 0.01), (WeightType::Q8_0, 0.6)] {
            for error in errors(Some(weights)) {
                assert!(error < most, "{weights}: {error}");
            }
        }
        assert!(errors(Some(WeightType::Q8_0)).iter().all(|error| *error > 1e-3));
    }

    #[test]
    fn shapes_of_no_encoder_are_refused() {
        let xl = flan_t5_xl();
        assert_eq!(check(&xl), Ok(()));
        for bad in [
            Config { num_layers: 1 << 30, ..xl.clone() },
            Config { num_heads: 0, ..xl.clone() },
            Config { relative_attention_num_buckets: 3, ..xl.clone() },
            Config { eos_token_id: 40_000, ..xl.clone() },
        ] {
            assert!(check(&bad).is_err());
        }
    }

    #[test]
    fn the_encoder_of_flan_t5_xl_has_its_published_size() {
        let asked = Weights::inventory();
        plain(&asked, &flan_t5_xl()).unwrap();
        let elements: usize = asked.asked().values().map(|shape| shape.iter().product::<usize>()).sum();
        assert_eq!(elements / 100_000, 12_235, "{elements}");
    }
}
