//! NextFlow: one decoder-only transformer that reads and writes text and images in one sequence.
//!
//! The floor plan, from the top; every module uses only those below it, but for [`terminal`], which
//! reports the events of [`generate`].
//!
//! | module | what |
//! |---|---|
//! | [`cli`] | the commands; the program's own, may change at any time |
//! | [`eval`], `train` | measuring and training of the built-in model, on [`scenes`] and a [`dataset`] |
//! | [`chat`] | conversations: [`chat::Session`] |
//! | [`codes`] | files of image codes, and the tokenizers that they belong to |
//! | [`generate`] | drawing: [`generate::Model`]; the next-scale loop is [`generate::draw_codes`] |
//! | [`backbone`], [`infinity`], [`onecat`], [`t5`], [`vision`], [`tokenizer`], [`refiner`], [`z_image`] | the networks, of the layers in `nn` |
//! | [`checkpoint`], `hub` | where weights come from |
//! | [`text`], [`pixels`], [`io`], [`terminal`] | text tokenizers; images; files; the terminal |
//! | [`ops`] | operations with kernels of their own: in `ops/cpu` and `ops/cuda` |
//! | [`device`], [`memory`], [`threads`], [`rng`], [`error`] | the machine, random numbers, the error type |

pub mod backbone;
pub mod chat;
pub mod checkpoint;
pub mod cli;
pub mod codes;
pub mod dataset;
pub mod device;
pub mod error;
pub mod eval;
pub mod generate;
#[cfg(feature = "hub")]
pub mod hub;
pub mod infinity;
pub mod io;
pub mod memory;
mod nn;
pub mod onecat;
pub mod ops;
pub mod pixels;
pub mod refiner;
pub mod rng;
pub mod scenes;
pub mod t5;
pub mod terminal;
pub mod text;
pub mod threads;
pub mod tokenizer;
#[cfg(feature = "train")]
pub mod train;
pub mod vision;
pub mod z_image;
