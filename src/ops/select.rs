//! Rows of a table.

use candle_core::{Result, Tensor};

/// The rows `ids` (N) u32 of x (rows, width): (N, width), of x's dtype.
///
/// Errors: an id that is not below the number of rows.
pub fn select(x: &Tensor, ids: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if x.track_op() && super::cuda::supports_f32(&[x]) {
        return super::cuda::select(x, ids);
    }
    x.index_select(ids, 0)
}
