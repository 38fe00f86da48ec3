//! OneCAT (arXiv 2509.03498): one Qwen2.5 transformer that reads text and pictures, answers, draws
//! scale by scale and edits. In place of each SwiGLU it has three experts, for text, for pictures
//! that are read, and for codes; attention and norms are shared.
//!
//! It is loaded in parts: [`Trunk`] always, [`Reading`] for prompts and conversations, [`Drawing`]
//! for codes.

mod config;
mod expert;
pub mod patches;
pub mod prompt;
pub mod rope;

use candle_core::{DType, Device, Result, Tensor, bail};

pub use config::{OneCatConfig, is_config, is_onecat};
pub use patches::PatchEmbedder;

use crate::backbone::{Cache, Context, Rope, SelfAttention, Step, SwiGlu};
use crate::checkpoint::{Init, Weights};
use crate::nn::{Linear, RmsNorm};
use crate::ops::{self, WeightMatrix};
use crate::vision::Patches;
use expert::AdaptedSwiGlu;
use prompt::Piece;

/// Initial weights of tables.
const TABLE: Init = Init::Normal { std: 0.02 };

/// The weights of layer `i`.
fn layer(w: &Weights, i: usize) -> Weights {
    w.pp("patch_language_model.model.layers").pp(i)
}

/// The shared part: attention and norms of every layer.
#[derive(Debug)]
pub struct Trunk {
    layers: Vec<Layer>,
    norm: RmsNorm,
    config: OneCatConfig,
    device: Device,
    dtype: DType,
}

#[derive(Debug)]
struct Layer {
    input_layernorm: RmsNorm,
    self_attn: SelfAttention,
    post_attention_layernorm: RmsNorm,
}

/// The feed-forward halves of all layers for the tokens of a pass.
#[derive(Clone, Copy, Debug)]
pub struct Expert<'a>(Kind<'a>);

#[derive(Clone, Copy, Debug)]
enum Kind<'a> {
    Plain(&'a [SwiGlu]),
    /// With the adapter of a scale.
    Adapted(&'a [AdaptedSwiGlu], usize),
}

impl Trunk {
    /// The keys `patch_language_model.model.{norm, layers.N.{input_layernorm, self_attn,
    /// post_attention_layernorm}}`.
    ///
    /// Errors: tensors that are missing or misshapen, and what [`OneCatConfig::check`] refuses.
    pub fn load(w: &Weights, config: &OneCatConfig) -> Result<Self> {
        config.check().map_err(candle_core::Error::Msg)?;
        let t = &config.transformer;
        let norm = |w: &Weights, name: &str| RmsNorm::load(&w.pp(name), t.hidden_size, t.rms_norm_eps);
        let load = |i: usize| {
            let w = layer(w, i);
            Ok(Layer {
                input_layernorm: norm(&w, "input_layernorm")?,
                self_attn: SelfAttention::load(&w.pp("self_attn"), t)?,
                post_attention_layernorm: norm(&w, "post_attention_layernorm")?,
            })
        };
        Ok(Self {
            layers: (0..t.num_hidden_layers).map(load).collect::<Result<_>>()?,
            norm: norm(&w.pp("patch_language_model.model"), "norm")?,
            config: config.clone(),
            device: w.device().clone(),
            dtype: w.dtype(),
        })
    }

    /// The config.
    pub fn config(&self) -> &OneCatConfig {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// A cache for a row, with room for `capacity` tokens.
    pub fn cache(&self, capacity: usize) -> Result<Cache> {
        Cache::new(&self.config.transformer, capacity, self.dtype, &self.device)
    }

    /// Runs x (R, T, hidden) through all layers with an expert, and the last norm.
    pub fn forward(&self, x: &Tensor, rope: &Rope, context: Context, expert: Expert) -> Result<Tensor> {
        let tokens = x.dim(1)?;
        // On a GPU the layers write over it.
        let mut x = if x.device().is_cpu() { x.clone() } else { x.copy()? };
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = layer.input_layernorm.forward(&x)?;
            x = layer.self_attn.forward_add(x, &normed, rope, i, &context)?;
            let normed = layer.post_attention_layernorm.forward(&x)?;
            x = match expert.0 {
                Kind::Plain(experts) => experts[i].forward_add(x, &normed)?,
                Kind::Adapted(experts, scale) => experts[i].forward_add(x, &normed, scale)?,
            };
        }
        context.finish(tokens);
        self.norm.forward(&x)
    }
}

/// Which parts of [`Reading`] are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadingParts {
    /// For pictures: the patch embedding and the understanding expert.
    pub pictures: bool,
    /// The head over the vocabulary, for answers.
    pub head: bool,
}

/// The part that reads text and pictures.
#[derive(Debug)]
pub struct Reading {
    embed_tokens: WeightMatrix,
    text: Vec<SwiGlu>,
    pictures: Option<(PatchEmbedder, Vec<SwiGlu>)>,
    head: Option<WeightMatrix>,
}

impl Reading {
    /// The keys `patch_language_model.{model.embed_tokens, model.layers.N.mlp_te}` and, by `parts`,
    /// `layers.N.mlp_ue`, `patch_vision_model`, `mlp` and `lm_head`.
    ///
    /// Errors: tensors that are missing or misshapen.
    pub fn load(w: &Weights, config: &OneCatConfig, parts: ReadingParts) -> Result<Self> {
        let t = &config.transformer;
        let table = (t.vocab_size, t.hidden_size);
        let language = w.pp("patch_language_model");
        let experts = |name: &str| {
            (0..t.num_hidden_layers).map(|i| SwiGlu::load(&layer(w, i).pp(name), t)).collect::<Result<Vec<_>>>()
        };
        let pictures = || Ok::<_, candle_core::Error>((PatchEmbedder::load(w, config)?, experts("mlp_ue")?));
        let head = || language.pp("lm_head").matrix(table, "weight", TABLE);
        Ok(Self {
            embed_tokens: language.pp("model.embed_tokens").matrix(table, "weight", Init::Normal { std: 0.5 })?,
            text: experts("mlp_te")?,
            pictures: parts.pictures.then(pictures).transpose()?,
            head: parts.head.then(head).transpose()?,
        })
    }

    /// Embeddings of ids (1, T) u32: (1, T, hidden).
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        let (rows, tokens) = ids.dims2()?;
        self.embed_tokens.select(&ids.flatten_all()?)?.reshape((rows, tokens, ()))
    }

    /// The expert for text.
    pub fn text(&self) -> Expert<'_> {
        Expert(Kind::Plain(&self.text))
    }

    /// The expert for pictures.
    ///
    /// Errors: it was not loaded.
    pub fn pictures(&self) -> Result<Expert<'_>> {
        self.loaded().map(|(_, experts)| Expert(Kind::Plain(experts)))
    }

    /// The patch embedding.
    ///
    /// Errors: it was not loaded.
    pub fn patches(&self) -> Result<&PatchEmbedder> {
        self.loaded().map(|(patches, _)| patches)
    }

    fn loaded(&self) -> Result<&(PatchEmbedder, Vec<SwiGlu>)> {
        self.pictures
            .as_ref()
            .ok_or_else(|| candle_core::Error::Msg("the part that reads pictures was not loaded".into()))
    }

    /// Features of parts of a picture, one after the other: (tokens, hidden).
    pub fn features(&self, parts: &[Patches]) -> Result<Tensor> {
        let patches = self.patches()?;
        let features: Vec<Tensor> = parts.iter().map(|part| patches.forward(part)).collect::<Result<_>>()?;
        Tensor::cat(&features, 0)
    }

    /// Logits of the vocabulary, (..., hidden) -> (..., vocabulary).
    ///
    /// Errors: the head was not loaded.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let head = self.head.as_ref();
        head.ok_or_else(|| candle_core::Error::Msg("the head was not loaded".into()))?.linear(hidden, None)
    }

    /// Hidden states (1, T, hidden) of tokens x (1, T, hidden) behind those in the cache: of text,
    /// with a causal mask, or with `picture` of a picture, all of whose tokens attend to each
    /// other. `rounded` rounds the rotary frequencies to bf16.
    pub fn read(&self, trunk: &Trunk, x: &Tensor, cache: &mut Cache, picture: bool, rounded: bool) -> Result<Tensor> {
        let rope = rope::sequence(&trunk.config, rounded, cache.len(), x.dim(1)?, &trunk.device)?;
        let (step, expert) = if picture { (Step::Scale, self.pictures()?) } else { (Step::Text, self.text()) };
        let context = Context::Cached { caches: std::slice::from_mut(cache), step };
        trunk.forward(x, &rope, context, expert)
    }

    /// The cache of the prompt of an image, without spare capacity. `picture` holds the features
    /// (tokens, hidden) of the source of an edit.
    pub fn prefix(&self, trunk: &Trunk, pieces: &[Piece], picture: Option<&Tensor>) -> Result<Cache> {
        let tokens = pieces.iter().map(|piece| match piece {
            Piece::Tokens(ids) => ids.len(),
            Piece::Picture => picture.map_or(0, |features| features.dims()[0]),
        });
        let mut cache = trunk.cache(tokens.sum())?;
        let rounded = trunk.config.bf16_frequencies;
        for piece in pieces {
            let (x, picture) = match (piece, picture) {
                (Piece::Tokens(ids), _) => (self.embed(&Tensor::new(&ids[..], &trunk.device)?.unsqueeze(0)?)?, false),
                (Piece::Picture, Some(features)) => (features.unsqueeze(0)?, true),
                (Piece::Picture, None) => bail!("there is no picture to edit"),
            };
            self.read(trunk, &x.to_dtype(trunk.dtype)?, &mut cache, picture, rounded)?;
        }
        Ok(cache)
    }
}

/// The part that reads codes and predicts them.
#[derive(Debug)]
pub struct Drawing {
    experts: Vec<AdaptedSwiGlu>,
    projector: [Linear; 3],
    /// Input of the first scale, (1, bits).
    start: Tensor,
    /// A row for every scale, (levels, hidden).
    levels: Tensor,
    /// In f32.
    out: [Linear; 2],
    dtype: DType,
}

impl Drawing {
    /// The keys `patch_language_model.model.layers.N.mlp_ge`, `image_gen_projector`,
    /// `image_gen_out_projector`, `sos_embedding` and `lvl_embed`.
    ///
    /// Errors: tensors that are missing or misshapen.
    pub fn load(w: &Weights, config: &OneCatConfig) -> Result<Self> {
        let t = &config.transformer;
        let (hidden, bits) = (t.hidden_size, config.bits);
        let exact = w.with_dtype(DType::F32);
        let (input, out) = (w.pp("image_gen_projector.mlp"), exact.pp("image_gen_out_projector.mlp"));
        let experts = (0..t.num_hidden_layers).map(|i| AdaptedSwiGlu::load(&layer(w, i).pp("mlp_ge"), config));
        Ok(Self {
            experts: experts.collect::<Result<_>>()?,
            projector: [
                Linear::load_dense(&input.pp(0), bits, hidden)?,
                Linear::load_dense(&input.pp(2), hidden, hidden)?,
                Linear::load_dense(&input.pp(4), hidden, hidden)?,
            ],
            start: exact.pp("sos_embedding").get((1, bits), "weight", TABLE)?,
            levels: w.pp("lvl_embed").get((config.levels, hidden), "weight", TABLE)?,
            out: [Linear::load_dense(&out.pp(0), hidden, hidden)?, Linear::load_dense(&out.pp(2), hidden, 2 * bits)?],
            dtype: w.dtype(),
        })
    }

    /// The expert for the codes of scale `si`.
    pub fn scale(&self, si: usize) -> Expert<'_> {
        Expert(Kind::Adapted(&self.experts, si))
    }

    /// Input of the first scale, (1, 1, bits) in f32.
    pub fn start(&self) -> Result<Tensor> {
        self.start.unsqueeze(0)
    }

    /// Tokens of scale `si` from its features (B, T, bits) in f32: (B, T, hidden).
    pub fn embed(&self, si: usize, features: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.projector;
        let x = ops::gelu_erf(&first.forward(&features.to_dtype(self.dtype)?)?)?;
        let x = third.forward(&ops::gelu_erf(&second.forward(&x)?)?)?;
        x.broadcast_add(&self.levels.narrow(0, si, 1)?)
    }

    /// Logits of every bit of hidden states (R, T, hidden): (R, T, 2 * bits) in f32, those of 0 and
    /// of 1 side by side.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let [first, second] = &self.out;
        second.forward(&ops::gelu_erf(&first.forward(&hidden.to_dtype(DType::F32)?)?)?)
    }
}
