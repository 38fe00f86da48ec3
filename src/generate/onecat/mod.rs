//! OneCAT's drawing and editing: files, settings of the reference, rows, and the loaded model.

mod files;
mod model;
mod rows;
mod setup;

pub use files::{HUB, TOKENIZER, TOKENIZER_HUB, in_folder, needs_tokenizer};
pub use model::OneCatModel;
pub use rows::{Guided, OneCatRows};
pub use setup::{OneCatSetup, compare_transformer};
