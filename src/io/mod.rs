//! Input and output of files.

pub mod input;
pub mod output;
mod temp;

use std::path::Path;

/// The folder of `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    here(path.parent().unwrap_or(path))
}

fn here(folder: &Path) -> &Path {
    if folder.as_os_str().is_empty() { Path::new(".") } else { folder }
}
