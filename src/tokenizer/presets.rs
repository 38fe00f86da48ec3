//! TokenFlow's two public tokenizers, the semantic encoder that NextFlow names, and Infinity's six
//! public tokenizers.

use super::{
    BitConfig, BitTokenizerConfig, CnnConfig, CnnLayout, CodebookConfig, PositionResampling, SemanticDecoderConfig,
    TokenizerConfig, VitConfig, VitFeatures, VitLayout,
};

/// A public tokenizer: its shape, and settings that its checkpoint lacks.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// The checkpoint's name, without `tokenflow_` and `.pt`.
    pub name: &'static str,
    /// Its shape.
    pub config: TokenizerConfig,
    /// Side of the square images that go in and come out.
    pub image_size: usize,
    /// Its one schedule, coarse to fine, (height, width).
    pub scales: Vec<(usize, usize)>,
}

impl Preset {
    /// Every preset.
    pub fn all() -> [Self; 2] {
        [Self::clipb_32k_enhanced(), Self::siglip_32k()]
    }

    /// `tokenflow_clipb_32k_enhanced.pt`: CLIP ViT-B/16 at 256 px, the tokenizer of TokenFlow-t2i;
    /// 817 codes.
    pub fn clipb_32k_enhanced() -> Self {
        let semantic = VitConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            patch_size: 16,
            native_grid: 14,
            layout: VitLayout::Clip,
            positions: PositionResampling::BicubicOffset,
            features: VitFeatures::Normed,
        };
        let semantic_decoder = SemanticDecoderConfig { out_dim: Some(512), ..SEMANTIC_DECODER };
        let config = TokenizerConfig {
            semantic,
            semantic_decoder,
            encoder: cnn(128, 2),
            decoder: cnn(256, 4),
            codebook: CODEBOOK,
            image_size: None,
        };
        let scales = squares(&[1, 2, 4, 6, 8, 10, 12, 14, 16]);
        Self { name: "clipb_32k_enhanced", config, image_size: 256, scales }
    }

    /// `tokenflow_siglip_32k.pt`: SigLIP so400m patch14 at 384 px, the tokenizer of TokenFlow-XL;
    /// 2227 codes.
    pub fn siglip_32k() -> Self {
        let semantic = VitConfig {
            patch_size: 14,
            native_grid: 27,
            layout: VitLayout::Siglip,
            positions: PositionResampling::Bicubic,
            features: VitFeatures::Penultimate,
            ..VitConfig::siglip2_so400m_naflex()
        };
        let semantic_decoder =
            SemanticDecoderConfig { num_attention_heads: Some(12), intermediate_size: Some(4608), ..SEMANTIC_DECODER };
        let config = TokenizerConfig {
            semantic,
            semantic_decoder,
            encoder: cnn(128, 2),
            decoder: cnn(128, 2),
            codebook: CODEBOOK,
            image_size: Some(384),
        };
        let scales = squares(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 17, 22, 27]);
        Self { name: "siglip_32k", config, image_size: 384, scales }
    }
}

/// A public tokenizer of Infinity.
#[derive(Clone, Debug, PartialEq)]
pub struct BitPreset {
    /// The checkpoint's name, without `infinity_vae_` and `.pth`.
    pub name: &'static str,
    /// Its shape.
    pub config: BitTokenizerConfig,
    /// The public transformer that was trained on its codes, if there is one.
    pub transformer: Option<&'static str>,
}

impl BitPreset {
    /// Every preset. `d32` and `d32reg` have the same shape, so a file alone does not show which it
    /// is.
    pub fn all() -> [Self; 6] {
        let f16 = |name, dim, transformer| {
            let config = bit_tokenizer(&[1, 2, 4, 4, 4], BitConfig { dim, patch: 1 });
            Self { name, config, transformer }
        };
        [
            f16("d16", 16, Some("Infinity 125M")),
            f16("d24", 24, None),
            f16("d32reg", 32, Some("Infinity 2B")),
            f16("d32", 32, None),
            f16("d64", 64, None),
            Self {
                name: "d56_f8_14_patchify",
                config: bit_tokenizer(&[1, 2, 4, 4], BitConfig { dim: 14, patch: 2 }),
                transformer: Some("Infinity 8B"),
            },
        ]
    }

    /// Its file on the hub.
    pub fn file(&self) -> String {
        format!("infinity_vae_{}.pth", self.name)
    }

    /// Those of a shape, whichever keys it has: none, one, or `d32reg` and `d32`.
    pub fn of(config: &BitTokenizerConfig) -> Vec<Self> {
        let public = |half: &CnnConfig| CnnConfig { layout: CnnLayout::Infinity, ..half.clone() };
        let BitTokenizerConfig { encoder, decoder, bits } = config;
        let config = BitTokenizerConfig { encoder: public(encoder), decoder: public(decoder), bits: *bits };
        Self::all().into_iter().filter(|preset| preset.config == config).collect()
    }
}

fn bit_tokenizer(ch_mult: &[usize], bits: BitConfig) -> BitTokenizerConfig {
    let half =
        CnnConfig { ch_mult: ch_mult.to_vec(), z_channels: bits.dim, layout: CnnLayout::Infinity, ..cnn(128, 2) };
    BitTokenizerConfig { encoder: half.clone(), decoder: half, bits }
}

impl VitConfig {
    /// SigLIP2 so400m patch16 NaFlex (`google/siglip2-so400m-patch16-naflex`), at any grid.
    pub fn siglip2_so400m_naflex() -> Self {
        Self {
            hidden_size: 1152,
            intermediate_size: 4304,
            num_hidden_layers: 27,
            num_attention_heads: 16,
            patch_size: 16,
            native_grid: 16,
            layout: VitLayout::Naflex,
            positions: PositionResampling::Bilinear,
            features: VitFeatures::Normed,
        }
    }
}

const SEMANTIC_DECODER: SemanticDecoderConfig =
    SemanticDecoderConfig { depth: 3, num_attention_heads: None, intermediate_size: None, out_dim: None };

const CODEBOOK: CodebookConfig =
    CodebookConfig { size: 32768, semantic_dim: 32, pixel_dim: 8, w_sem: 1.0, w_pix: 1.0, l2_norm: true };

fn cnn(ch: usize, num_res_blocks: usize) -> CnnConfig {
    CnnConfig {
        ch,
        ch_mult: vec![1, 1, 2, 2, 4],
        num_res_blocks,
        z_channels: 256,
        groups: 32,
        patch: 1,
        layout: Default::default(),
    }
}

fn squares(sides: &[usize]) -> Vec<(usize, usize)> {
    sides.iter().map(|&side| (side, side)).collect()
}
