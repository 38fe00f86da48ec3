//! NextFlow: one decoder-only transformer that reads and writes text and images in one sequence.
//!
//! [`generate::Model`] draws: `Model::load`, then `Model::draw`; the next-scale loop is [`generate::draw_codes`].
//! [`chat::Session`] converses. [`ops`] has the kernels of all of it. [`cli`] is the program's own and may change at any time.
//!
//! Data flows one way: [`cli`] -> [`checkpoint`] -> ([`text`] | [`pixels`] ->
//! [`tokenizer`]) -> [`generate`] over the [`backbone`] -> [`tokenizer`] -> [`output`].

pub mod backbone;
pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod codec;
pub mod codes;
pub mod device;
pub mod error;
pub mod eval;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
pub mod infinity;
pub mod input;
pub mod library;
pub mod memory;
mod nn;
pub mod onecat;
pub mod ops;
pub mod output;
pub mod pixels;
pub mod rng;
pub mod scenes;
pub mod settings;
pub mod size;
pub mod t5;
pub mod terminal;
pub mod text;
pub mod threads;
pub mod tokenizer;
#[cfg(feature = "train")]
pub mod train;
pub mod vision;
