//! Types of a model's matrices.

use std::fmt;

use candle_core::DType;
use candle_core::quantized::GgmlDType;
use clap::ValueEnum;
use serde::Serialize;

/// Type of the linear layers' weights and of the table of tokens. Norms, biases and small tables
/// stay in the type of the activations: f32 on a CPU, bf16 on a GPU beside quantised weights, else
/// this type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum WeightType {
    /// 32 bits a number
    F32,
    /// 16 bits, with the range of f32
    Bf16,
    /// 16 bits, with more precision
    F16,
    /// 8.5 bits: blocks of 32 signed bytes and a scale
    #[value(name = "q8_0")]
    #[serde(rename = "q8_0")]
    Q8_0,
    /// 4.5 bits: blocks of 32 and a scale; for widths that 256 does not divide, too
    #[value(name = "q4_0")]
    #[serde(rename = "q4_0")]
    Q4_0,
    /// 4.5 bits: GGML's blocks of 256
    #[value(name = "q4_K", alias = "q4_k")]
    #[serde(rename = "q4_K")]
    Q4K,
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

impl WeightType {
    /// The blocks that hold it; none for plain f32.
    pub fn blocks(self) -> Option<GgmlDType> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(GgmlDType::BF16),
            Self::F16 => Some(GgmlDType::F16),
            Self::Q8_0 => Some(GgmlDType::Q8_0),
            Self::Q4_0 => Some(GgmlDType::Q4_0),
            Self::Q4K => Some(GgmlDType::Q4K),
        }
    }

    /// The default.
    pub fn usual(cpu: bool) -> Self {
        if cpu { Self::F32 } else { Self::Bf16 }
    }

    /// How it is stored on a device: the type of tensors and activations, and of matrices. A GPU
    /// computes in half precision itself; a CPU computes in f32 from whatever the blocks are.
    pub(crate) fn placed(self, cpu: bool) -> (DType, Matrices) {
        let matrices = self.blocks().map_or(Matrices::Tensors, Matrices::Blocks);
        match self {
            Self::Bf16 if !cpu => (DType::BF16, Matrices::Tensors),
            Self::F16 if !cpu => (DType::F16, Matrices::Tensors),
            Self::Q8_0 | Self::Q4_0 | Self::Q4K if !cpu => (DType::BF16, matrices),
            _ => (DType::F32, matrices),
        }
    }
}

/// How matrices are stored. Blocks of a file stay blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Matrices {
    /// As tensors, of the type of the others.
    #[default]
    Tensors,
    /// Int8 with a scale per row as in the file, where that is
    /// [supported](crate::ops::Int8Matrix::supports); others are tensors.
    Bytes,
    /// In blocks.
    Blocks(GgmlDType),
}
