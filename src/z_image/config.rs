//! Shapes of Z-Image, read from a folder in the layout of diffusers, and the memory that they take.

use candle_core::DType;
use candle_transformers::models::z_image::{Config, TextEncoderConfig, VaeConfig};
use serde_json::Value;

use super::HUB;
use super::schedule::Schedule;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::nn::MAX_LAYERS;

/// Names the classes of a pipeline.
pub const INDEX: &str = "model_index.json";
/// The transformer's weights in a model folder.
pub const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";
/// The text encoder's weights.
pub const TEXT_ENCODER: &str = "text_encoder/model.safetensors";
/// The autoencoder's weights.
pub const VAE: &str = "vae/diffusion_pytorch_model.safetensors";
/// The text tokenizer.
pub const TOKENIZER: &str = "tokenizer/tokenizer.json";

/// Pixels of a latent along each side.
pub(super) const CELL: usize = 8;
/// Latents of a token of the transformer along each side.
pub(super) const PATCH: usize = 2;
/// Both sides of a picture are multiples of this many pixels.
pub const MULTIPLE: u32 = (CELL * PATCH) as u32;
/// The shorter side of a picture has at least this many pixels: the model was trained on larger
/// ones.
pub const SMALLEST: u32 = 512;

/// Tokens of the longest prompt that is read.
pub const MAX_TOKENS: usize = 512;

/// Shapes and settings of a whole model.
#[derive(Clone, Debug)]
pub struct ZImageConfig {
    /// The transformer.
    pub transformer: Config,
    /// The text encoder, a Qwen3.
    pub text: TextEncoderConfig,
    /// The autoencoder.
    pub vae: VaeConfig,
    /// The noise levels.
    pub schedule: Schedule,
}

impl ZImageConfig {
    /// Z-Image-Turbo's.
    pub fn turbo() -> Self {
        let text = TextEncoderConfig { max_position_embeddings: MAX_TOKENS, ..TextEncoderConfig::z_image() };
        let transformer = Config::z_image_turbo();
        Self { transformer, text, vae: VaeConfig::z_image(), schedule: Schedule { shift: 3.0 } }
    }

    /// Reads and checks the configs of a folder.
    ///
    /// Errors: [`crate::error::Kind::Model`] for a folder that holds another model, and for configs
    /// that are missing, broken or do not belong together.
    pub fn read(source: &Source) -> Result<Self> {
        check_class(source)?;
        let bad = |file: &str, what: String| {
            Error::model(format!("{file} of {source}: {what}")).hint(format!("copy it from {HUB} again"))
        };
        let [transformer, text, vae] = ["transformer", "text_encoder", "vae"].map(|part| format!("{part}/config.json"));
        let parse = |file: &str| source.read_json(file);
        let theta = |json: &Value| json.pointer("/rope_parameters/rope_theta").and_then(Value::as_f64);
        let json = parse(&text)?;
        let mut text_config: TextEncoderConfig =
            serde_json::from_value(json.clone()).map_err(|e| bad(&text, e.to_string()))?;
        // Since transformers 5 it has a place of its own.
        text_config.rope_theta = theta(&json).unwrap_or(text_config.rope_theta);
        // The table of rotations need not be longer than a prompt.
        text_config.max_position_embeddings = MAX_TOKENS;
        let config = Self {
            transformer: serde_json::from_value(parse(&transformer)?).map_err(|e| bad(&transformer, e.to_string()))?,
            text: text_config,
            vae: serde_json::from_value(parse(&vae)?).map_err(|e| bad(&vae, e.to_string()))?,
            schedule: Schedule::read(source)?,
        };
        check_transformer(&config.transformer).map_err(|what| bad(&transformer, what))?;
        check_text(&config.text).map_err(|what| bad(&text, what))?;
        check_vae(&config.vae).map_err(|what| bad(&vae, what))?;
        if config.transformer.cap_feat_dim != config.text.hidden_size {
            let (reads, gives) = (config.transformer.cap_feat_dim, config.text.hidden_size);
            return Err(bad(
                &transformer,
                format!("it reads {reads} features of text, the text encoder gives {gives}"),
            ));
        }
        if config.transformer.in_channels != config.vae.latent_channels {
            let (reads, gives) = (config.transformer.in_channels, config.vae.latent_channels);
            return Err(bad(&transformer, format!("it reads {reads} channels, the autoencoder gives {gives}")));
        }
        Ok(config)
    }

    /// The largest side of a picture, in pixels: beyond it there are no positions.
    pub fn largest(&self) -> u32 {
        let positions = self.transformer.axes_lens[1].min(self.transformer.axes_lens[2]);
        (positions as u32).saturating_mul(MULTIPLE)
    }
}

/// The type of the weights of transformer and text encoder: the one that they are published in.
pub const DTYPE: DType = DType::BF16;

/// Checks that a folder holds a Z-Image.
///
/// Errors: [`crate::error::Kind::Model`] if it does not.
pub fn check_class(source: &Source) -> Result<()> {
    if !source.has_file(INDEX) {
        return Err(no_refiner(&source.to_string(), &format!("it has no {INDEX}")));
    }
    let index = source.read_json(INDEX)?;
    let class = index.get("_class_name").and_then(Value::as_str).unwrap_or("");
    match class.starts_with("ZImage") {
        true => Ok(()),
        false => Err(no_refiner(&source.to_string(), &format!("{INDEX} names {class:?}, not Z-Image"))),
    }
}

/// The error of a model that does not refine.
pub fn no_refiner(name: &str, why: &str) -> Error {
    Error::model(format!("{name} is no refiner: {why}")).hint(format!("--refiner {HUB}, or a copy of all its folders"))
}

/// Whether all files of a model are there.
pub fn is_whole(source: &Source) -> bool {
    source.has_file(INDEX)
        && source.has_file(TOKENIZER)
        && [TRANSFORMER, TEXT_ENCODER, VAE].iter().all(|file| source.find(file).is_ok())
}

/// More than any size of a network has.
const MOST: usize = 1 << 20;

fn sizes(of: &[usize]) -> std::result::Result<(), String> {
    match of.iter().all(|n| (1..=MOST).contains(n)) {
        true => Ok(()),
        false => Err("its sizes are those of no network".into()),
    }
}

/// Errors: what candle-transformers' network does not read, or would panic at.
fn check_transformer(c: &Config) -> std::result::Result<(), String> {
    sizes(&[c.in_channels, c.dim, c.n_heads, c.n_kv_heads, c.cap_feat_dim])?;
    sizes(&c.axes_dims)?;
    sizes(&c.axes_lens)?;
    if c.n_layers > MAX_LAYERS || c.n_refiner_layers > MAX_LAYERS {
        return Err(format!("it has {} layers", c.n_layers.max(c.n_refiner_layers)));
    }
    if c.all_patch_size != [PATCH] || c.all_f_patch_size != [1] {
        return Err("its patches are not 2x2".into());
    }
    if c.n_kv_heads != c.n_heads || !c.dim.is_multiple_of(c.n_heads) || !c.dim.is_multiple_of(3) {
        return Err(format!("{} heads of {} in all, {} of keys", c.n_heads, c.dim, c.n_kv_heads));
    }
    let even = c.axes_dims.iter().all(|dim| dim.is_multiple_of(2));
    if c.axes_dims.len() != 3 || c.axes_lens.len() != 3 || !even || c.axes_dims.iter().sum::<usize>() != c.head_dim() {
        return Err(format!("its positions do not fit heads of {}", c.head_dim()));
    }
    if c.axes_lens[0] <= MAX_TOKENS + 1 || c.axes_lens.iter().any(|&len| len > 1 << 16) {
        return Err(format!("it has {:?} positions", c.axes_lens));
    }
    if ![c.norm_eps, c.rope_theta, c.t_scale].iter().all(|x| x.is_finite() && *x > 0.0) {
        return Err("norm_eps, rope_theta or t_scale is not a positive number".into());
    }
    Ok(())
}

/// Errors: as [`check_transformer`].
fn check_text(c: &TextEncoderConfig) -> std::result::Result<(), String> {
    let heads = [c.num_attention_heads, c.num_key_value_heads, c.head_dim];
    sizes(&[c.vocab_size, c.hidden_size, c.intermediate_size])?;
    sizes(&heads)?;
    if !(2..=MAX_LAYERS).contains(&c.num_hidden_layers) {
        return Err(format!("it has {} layers", c.num_hidden_layers));
    }
    if !c.num_attention_heads.is_multiple_of(c.num_key_value_heads) || !c.head_dim.is_multiple_of(2) {
        return Err(format!("{} heads of {}, {} of keys", heads[0], heads[2], heads[1]));
    }
    if !c.rms_norm_eps.is_finite() || !c.rope_theta.is_finite() || c.rope_theta <= 0.0 {
        return Err("rms_norm_eps or rope_theta is not a number".into());
    }
    Ok(())
}

/// Errors: as [`check_transformer`].
fn check_vae(c: &VaeConfig) -> std::result::Result<(), String> {
    sizes(&c.block_out_channels)?;
    sizes(&[c.latent_channels, c.layers_per_block, c.norm_num_groups])?;
    if c.block_out_channels.len() != 1 + CELL.ilog2() as usize || c.layers_per_block > MAX_LAYERS {
        return Err(format!("a latent is {CELL} pixels wide, which takes 4 blocks"));
    }
    if c.in_channels != 3 || c.out_channels != 3 {
        return Err(format!("pictures of {} and {} channels", c.in_channels, c.out_channels));
    }
    if let Some(n) = c.block_out_channels.iter().find(|n| !n.is_multiple_of(c.norm_num_groups)) {
        return Err(format!("{n} channels in {} groups", c.norm_num_groups));
    }
    if !c.scaling_factor.is_finite() || c.scaling_factor == 0.0 || !c.shift_factor.is_finite() {
        return Err("scaling_factor or shift_factor is not a number".into());
    }
    Ok(())
}
