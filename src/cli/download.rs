//! What is to be downloaded.

use serde::Serialize;

/// A file of the hub.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
#[derive(Clone, Debug, Serialize)]
pub struct Download {
    /// Its name in the repository.
    pub name: String,
    /// Its length, if the hub states it.
    pub bytes: Option<u64>,
}
