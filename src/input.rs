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

/// Text without the mark that editors of some systems put before UTF-8.
pub fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text)
}

/// A path as a shell reads it, for commands that are to be copied.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    // What begins with a hyphen would be a flag.
    let text = if text.starts_with('-') { format!("./{text}") } else { text };
    if !text.is_empty() && text.chars().all(plain) {
        return text;
    }
    if !text.chars().any(char::is_control) {
        return format!("'{}'", text.replace('\'', "'\\''"));
    }
    let spelt = |c: char| match c {
        '\'' | '\\' => format!("\\{c}"),
        c if c.is_control() => format!("\\u{:04x}", c as u32),
        c => c.to_string(),
    };
    format!("$'{}'", text.chars().map(spelt).collect::<String>())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_quoted_paths_as_they_are() {
        for (path, quoted_as) in [
            ("a/b-1.png", "a/b-1.png"),
            ("猫.png", "猫.png"),
            ("my pics", "'my pics'"),
            ("it's", "'it'\\''s'"),
            ("-o", "./-o"),
            ("$(rm x)", "'$(rm x)'"),
            ("a\nb'c", "$'a\\u000ab\\'c'"),
        ] {
            assert_eq!(quoted(Path::new(path)), quoted_as);
            #[cfg(unix)]
            {
                let echo = format!("printf %s {}", quoted(Path::new(path)));
                let Ok(said) = std::process::Command::new("bash").args(["-c", &echo]).output() else { continue };
                assert_eq!(String::from_utf8_lossy(&said.stdout).trim_start_matches("./"), path);
            }
        }
    }
}
