//! What a user names by a path: a file, or standard input by the name `-`.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Whether something was read from standard input already: what comes second would find it empty.
static READ: AtomicBool = AtomicBool::new(false);

/// Whether a path names standard input.
pub fn is_stdin(path: &Path) -> bool {
    path == OsStr::new("-")
}

/// What errors call a path.
pub fn shown(path: &Path) -> String {
    if is_stdin(path) { "standard input".into() } else { path.display().to_string() }
}

/// The lines of a file, or of standard input, as they come.
///
/// Errors: usage, with `hint`: what cannot be opened, and standard input that was read before.
pub fn lines(path: &Path, hint: &str) -> Result<Box<dyn BufRead>> {
    if is_stdin(path) {
        once()?;
        return Ok(Box::new(io::stdin().lock()));
    }
    let failed = |e: io::Error| Error::usage(format!("cannot read {}: {e}", shown(path))).hint(hint);
    Ok(Box::new(BufReader::new(File::open(path).map_err(failed)?)))
}

/// Standard input, if nothing has read it.
fn once() -> Result<()> {
    match READ.swap(true, Ordering::Relaxed) {
        false => Ok(()),
        true => Err(Error::usage("standard input can be read once, but - is named twice")
            .hint("name a file in the place of one of them")),
    }
}

/// The bytes of a file, or of standard input, of which there may be `most`.
///
/// Errors: usage, with `hint`: what cannot be read or is longer, and standard input that was read before.
pub fn read(path: &Path, most: u64, hint: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |e: io::Error| Error::usage(format!("cannot read {}: {e}", shown(path))).hint(hint);
    if is_stdin(path) {
        once()?;
        io::stdin().lock().take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
    } else {
        File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(failed)?;
    }
    if bytes.len() as u64 > most {
        return Err(Error::usage(format!("{} is longer than {} MB", shown(path), most >> 20)).hint(hint));
    }
    Ok(bytes)
}

/// As [`read`], of a file that somebody sends: nobody types one.
///
/// Errors: usage as well for standard input that is a terminal, or empty.
pub fn piped(path: &Path, most: u64, hint: &str) -> Result<Vec<u8>> {
    if is_stdin(path) && io::stdin().is_terminal() {
        return Err(Error::usage("standard input is a terminal, which sends no file").hint(hint));
    }
    match read(path, most, hint)? {
        bytes if bytes.is_empty() && is_stdin(path) => Err(Error::usage("standard input is empty").hint(hint)),
        bytes => Ok(bytes),
    }
}
