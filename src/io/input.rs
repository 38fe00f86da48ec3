//! Inputs named by a path: a file, or standard input by the name `-`.

use std::fs::File;
use std::io::{self, BufRead, BufReader, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Whether standard input has been read: a second reader would find it empty.
static READ: AtomicBool = AtomicBool::new(false);

/// Whether a path names standard input.
pub fn is_stdin(path: &Path) -> bool {
    ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"].iter().any(|name| path.as_os_str() == *name)
}

/// Whether a path is the address of something on the web.
pub fn is_address(path: &Path) -> bool {
    let scheme = path.to_str().and_then(|text| text.split_once("://")).map(|(scheme, _)| scheme);
    scheme.is_some_and(|s| ["http", "https", "ftp", "s3", "gs"].iter().any(|known| s.eq_ignore_ascii_case(known)))
}

/// The error of a path that cannot be read, for the reason `e`.
pub fn unreadable(path: &Path, e: io::Error, hint: &str) -> Error {
    match is_address(path) {
        true => Error::usage(format!("{} is an address, and addresses are not fetched", path.display()))
            .hint(format!("curl -sLO {}, then name the file", quoted(path))),
        false => Error::usage(format!("cannot read {}: {e}", shown(path))).hint(hint).because(e),
    }
}

/// What errors call a path.
pub fn shown(path: &Path) -> String {
    if is_stdin(path) { "standard input".into() } else { path.display().to_string() }
}

/// Text without the mark that editors of some systems put before UTF-8.
pub fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix("\u{feff}".as_bytes()).unwrap_or(text)
}

/// Whether text with this beginning is UTF-16: it has the byte order mark, or zeros beside its
/// first two letters.
pub fn is_utf16(head: &[u8]) -> bool {
    matches!(head, [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) || zeros(head).is_some()
}

/// Whether the zeros of UTF-16 follow the first two letters, or precede them.
fn zeros(head: &[u8]) -> Option<bool> {
    match head {
        [a, 0, b, 0, ..] if *a > 0 && *b > 0 => Some(true),
        [0, a, 0, b, ..] if *a > 0 && *b > 0 => Some(false),
        _ => None,
    }
}

/// Text as UTF-8 without a mark: as it is or, where a mark or the zeros of its first letters show
/// that it is UTF-16, as shells and editors of some systems write it, converted.
pub fn utf8(text: Vec<u8>) -> Vec<u8> {
    let utf16 = |rest: &[u8], number: fn([u8; 2]) -> u16| {
        let units: Vec<u16> = rest.as_chunks::<2>().0.iter().map(|unit| number(*unit)).collect();
        String::from_utf16(&units).ok().filter(|_| rest.len().is_multiple_of(2)).map(String::into_bytes)
    };
    let converted = match &text[..] {
        [0xff, 0xfe, rest @ ..] => utf16(rest, u16::from_le_bytes),
        [0xfe, 0xff, rest @ ..] => utf16(rest, u16::from_be_bytes),
        _ => match zeros(&text) {
            Some(true) => utf16(&text, u16::from_le_bytes),
            Some(false) => utf16(&text, u16::from_be_bytes),
            None => None,
        },
    };
    match converted {
        Some(text) => text,
        None if text.starts_with("\u{feff}".as_bytes()) => without_bom(&text).into(),
        None => text,
    }
}

/// A path as a shell reads it, for commands that are to be copied.
pub fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    // A leading hyphen would make it a flag.
    quoted_words(&if text.starts_with('-') { format!("./{text}") } else { text })
}

/// Text as a shell reads it.
pub fn quoted_words(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:@%,".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.into();
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

/// The files that a line names, as typed, or as a terminal pastes a dropped file: plain, in quotes,
/// with backslashes before blanks, with `~` for the home folder, or as `file://` addresses. A line
/// that names no files is one path.
pub fn dropped(text: &str) -> Vec<PathBuf> {
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    let bare = ['"', '\''].iter().find_map(|q| text.strip_prefix(*q)?.strip_suffix(*q)).unwrap_or(text);
    if let Some(path) = [text.into(), located(text), located(bare)].into_iter().find(is_there) {
        return vec![path];
    }
    let words: Vec<PathBuf> = shell_words(text).unwrap_or_default().iter().map(|word| located(word)).collect();
    match &words[..] {
        [_] => words,
        [] => vec![text.into()],
        _ if words.iter().all(is_there) => words,
        _ => vec![located(bare)],
    }
}

/// The path of one word of a line.
fn located(word: &str) -> PathBuf {
    if let Some(rest) = word.strip_prefix("file://") {
        let path = rest.strip_prefix("localhost").unwrap_or(rest).as_bytes();
        let (mut bytes, mut at) = (Vec::new(), 0);
        while let Some(&byte) = path.get(at) {
            let digits = path.get(at + 1..at + 3).filter(|_| byte == b'%').and_then(|d| std::str::from_utf8(d).ok());
            let code = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
            bytes.push(code.unwrap_or(byte));
            at += if code.is_some() { 3 } else { 1 };
        }
        #[cfg(unix)]
        return PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(bytes));
        #[cfg(not(unix))]
        return String::from_utf8_lossy(&bytes).trim_start_matches('/').into();
    }
    let home = || std::env::var_os("HOME").filter(|home| !home.is_empty());
    match (word.strip_prefix("~/"), home()) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => word.into(),
    }
}

/// The words of a line by a shell's quotes and backslashes; nothing if a quote has no end.
fn shell_words(text: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    let mut characters = text.chars();
    while let Some(c) = characters.next() {
        match (quote, c) {
            (None, c) if c.is_whitespace() => words.extend(word.take()),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (Some(q), c) if q == c => quote = None,
            (None | Some('"'), '\\') => word.get_or_insert_default().push(characters.next()?),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    quote.is_none().then_some(words)
}

/// The lines of a file, or of standard input, as they come.
///
/// Errors: usage, with `hint`: what cannot be opened, and standard input that was read before.
pub fn lines(path: &Path, hint: &str) -> Result<Box<dyn BufRead>> {
    if is_stdin(path) {
        once()?;
        return Ok(Box::new(io::stdin().lock()));
    }
    let failed = |e: io::Error| unreadable(path, e, hint);
    Ok(Box::new(BufReader::new(File::open(path).map_err(failed)?)))
}

/// Standard input, if nothing has read it.
fn once() -> Result<()> {
    match READ.swap(true, Ordering::Relaxed) {
        false => Ok(()),
        true => Err(Error::usage("standard input can be read once, but - is named twice")
            .hint("name a file instead of one of them")),
    }
}

/// The bytes of a file, or of standard input, of which there may be `most`.
///
/// Errors: usage, with `hint`: what cannot be read or is longer, and standard input that was read
/// before.
pub fn read(path: &Path, most: u64, hint: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let failed = |e: io::Error| unreadable(path, e, hint);
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

/// As [`read`], for content that is never typed, such as images.
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
    fn text_of_other_systems_becomes_utf8() {
        let text = "a 猫\r\n";
        let units = |mark: &str, bytes: fn(u16) -> [u8; 2]| -> Vec<u8> {
            [mark, text].concat().encode_utf16().flat_map(bytes).collect()
        };
        for bytes in [
            text.as_bytes().to_vec(),
            ["\u{feff}".as_bytes(), text.as_bytes()].concat(),
            units("\u{feff}", u16::to_le_bytes),
            units("\u{feff}", u16::to_be_bytes),
            units("", u16::to_le_bytes),
            units("", u16::to_be_bytes),
        ] {
            assert_eq!(utf8(bytes.clone()), text.as_bytes(), "{bytes:?}");
        }
        for bytes in [&b"\xff\xfe\0\xd8"[..], b"\xff\xfea", b"", b"\0", b"caf\xe9"] {
            assert_eq!(utf8(bytes.to_vec()), bytes);
        }
    }

    #[test]
    fn dropped_files_are_found_however_they_are_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let names = ["my pic.png", "b.png", "it's.png", "100%.png", "\"q\".png"];
        names.iter().for_each(|name| std::fs::write(path(name), "").unwrap());
        let at = folder.path().to_str().unwrap();
        for (text, found) in [
            (format!("{at}/my pic.png"), &names[..1]),
            (format!("'{at}/my pic.png'"), &names[..1]),
            (format!("\"{at}/my pic.png\""), &names[..1]),
            (format!("{at}/my\\ pic.png"), &names[..1]),
            (format!("file://{at}/my%20pic.png"), &names[..1]),
            (format!("file://localhost{at}/my%20pic.png"), &names[..1]),
            (format!("'{at}/my pic.png' {at}/b.png"), &names[..2]),
            (format!("'{at}/it'\\''s.png'"), &names[2..3]),
            (format!("{at}/it's.png"), &names[2..3]),
            (format!("file://{at}/100%.png"), &names[3..4]),
            (format!("{at}/\"q\".png"), &names[4..]),
        ] {
            assert_eq!(dropped(&text), found.iter().map(|name| path(name)).collect::<Vec<_>>(), "{text}");
        }
        assert_eq!(dropped("'no such.png'"), [Path::new("no such.png")]);
        assert_eq!(dropped("no such.png"), [Path::new("no such.png")]);
        if let Some(home) = std::env::var_os("HOME").filter(|home| !home.is_empty()) {
            assert_eq!(dropped("~/no.png"), [Path::new(&home).join("no.png")]);
        }
    }

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
