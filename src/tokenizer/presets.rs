//! TokenFlow's two public tokenizers, and the semantic encoder that NextFlow names.

use super::{
    CnnConfig, CodebookConfig, PositionResampling, SemanticDecoderConfig, TokenizerConfig, VitConfig, VitFeatures,
    VitLayout,
};

/// A public tokenizer: its shape, and what its checkpoint does not say.
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

    /// `tokenflow_clipb_32k_enhanced.pt`: CLIP ViT-B/16 at 256 px, the tokenizer of TokenFlow-t2i; 817 codes.
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

    /// `tokenflow_siglip_32k.pt`: SigLIP so400m patch14 at 384 px, the tokenizer of TokenFlow-XL; 2227 codes.
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
    CnnConfig { ch, ch_mult: vec![1, 1, 2, 2, 4], num_res_blocks, z_channels: 256, groups: 32, patch: 1 }
}

fn squares(sides: &[usize]) -> Vec<(usize, usize)> {
    sides.iter().map(|&side| (side, side)).collect()
}
