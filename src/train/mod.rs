//! The trainer: data, the tokenizer's stages, the transformer, and the checkpoint that ships.

pub mod average;
mod codebook;

pub mod dialogue;
pub mod export;
pub(crate) mod loss;
mod names;
mod optimizer;
pub mod pool;
pub mod prepare;
mod progress;
pub mod recipe;
pub mod refine_pool;
pub mod refiner;
pub mod rl;
pub mod run;
pub mod samples;
pub mod semantic;
mod sequence;
mod thing_edits;
pub mod tokenizer;
pub mod transformer;

#[cfg(test)]
mod tests;

pub use optimizer::Hyperparameters;
