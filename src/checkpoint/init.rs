//! The values that weights start from when no file has them.

/// Initial values of a tensor that is trained from nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal around zero.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform on (-bound, bound).
    Uniform {
        /// The largest magnitude.
        bound: f64,
    },
}
