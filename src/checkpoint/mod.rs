//! Where weights come from: the binary itself, a model folder, or a seed.
//!
//! A model folder has four files:
//!
//! | file | what |
//! |---|---|
//! | `config.json` | shape of the model and its default sampling |
//! | `tokenizer.json` | text tokenizer, in the format of the `tokenizers` library |
//! | `model.safetensors` | the transformer |
//! | `image_tokenizer.safetensors` | the image tokenizer |
//!
//! SentencePiece's `tokenizer.model` may take the place of `tokenizer.json`. Either of the weights'
//! files may also be in shards (`model.safetensors.index.json` names them, or their own names count
//! them), GGUF (`model.gguf`) or a PyTorch checkpoint (`model.pt`, `pytorch_model.bin`, its
//! shards).
//!
//! Keys are those of Qwen2.5-VL, in any layout that transformers writes, and of TokenFlow. Weights
//! are f32, bf16 or f16; a tensor may also be bytes (u8) with an f32 tensor `KEY.scale` of one
//! scale per row: value = (byte - 128) * scale.
//!
//! Files are not trusted: headers are checked before a byte of data is read, and all keys and
//! shapes are compared with those of the config before anything large is allocated. Tensors are
//! read one by one, and converted while reading.

mod archive;
mod convert;
mod embedded;
mod extend;
mod gguf;
mod header;
mod init;
mod inventory;
mod keys;
mod layout;
mod pickle;
mod plan;
mod shards;
mod source;
mod synthetic;
mod trainable;
mod weight_type;
mod weights;

pub use archive::{load, metadata, quantise, save};
pub use convert::{abandon, blocks, extract, quantise as quantise_model, whole_folder, write_gguf};
pub use extend::extend;
pub use init::Init;
pub use inventory::{FileSummary, Fit, Inventory};
pub use plan::load_file;
pub use shards::{files_with, shard_names};
pub use source::{NANO, Parts, Source, copy_weights};
pub use weight_type::{Matrices, WeightType};
pub use weights::Weights;
pub(crate) use weights::placeholder;

/// The file of the transformer's weights in a model folder.
pub const TRANSFORMER: &str = "model.safetensors";
/// The file of the image tokenizer's weights in a model folder.
pub const IMAGE_TOKENIZER: &str = "image_tokenizer.safetensors";

#[cfg(test)]
mod tests;
