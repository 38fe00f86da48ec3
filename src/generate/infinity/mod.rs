//! Infinity: its variants, setup and whole model.

mod features;
mod files;
mod model;
mod rows;
mod setup;
mod variants;

pub use features::FeatureStore;
pub use files::{choose, config, in_folder, is_config, split};
pub use model::InfinityModel;
pub use rows::InfinityRows;
pub use setup::InfinitySetup;
pub use variants::{HUB, TEXT_HUB, VARIANTS, Variant};

use super::ratios::LEVELS;

/// The grid (height, width) that all scales of an image are placed on (RoPE): the last one of its
/// ratio's largest level.
pub fn lattice(scales: &[(usize, usize)]) -> Option<(usize, usize)> {
    setup::ratio_of(scales)?.scales.last().copied()
}
