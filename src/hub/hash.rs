//! Hashes of files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

use super::listing::Hash;
use super::{Event, Observer, cannot};
use crate::error::Result;

/// Whether the content of `path` is that of `hash`.
pub(super) fn agrees(path: &Path, hash: &Hash, observer: Observer) -> Result<bool> {
    match hash {
        Hash::Sha256(digits) => Ok(sha256(path, observer)? == *digits),
        Hash::Git(digits) => {
            let length = path.metadata().map_err(|e| cannot(path, e))?.len();
            let start = Sha1::new_with_prefix(format!("blob {length}\0"));
            Ok(digest(path, start, observer)? == *digits)
        }
    }
}

/// The SHA-256 of a file, in lower-case hexadecimal.
pub(super) fn sha256(path: &Path, observer: Observer) -> Result<String> {
    digest(path, Sha256::new(), observer)
}

fn digest<D: Digest>(path: &Path, mut hash: D, observer: Observer) -> Result<String> {
    let mut file = File::open(path).map_err(|e| cannot(path, e))?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|e| cannot(path, e))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
        observer(Event::Tick)?;
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
