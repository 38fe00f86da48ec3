//! Messages line by line: from a person at a terminal, or from a pipe.

use std::fs;
use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;

use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use crate::error::{Error, Kind, Result};
use crate::io::input;

/// The longest message, in bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// Before and after a message of several lines.
const QUOTE: &[u8] = b"\"\"\"";

/// Where lines come from.
pub(super) enum Lines {
    Terminal(Box<DefaultEditor>, Option<PathBuf>),
    Pipe,
}

/// A line, or why there is none.
enum Line {
    Text(Vec<u8>),
    /// Ctrl-C while typing.
    Dropped,
    End,
}

impl Lines {
    /// Standard input.
    pub fn open() -> Result<Self> {
        Ok(match io::stdin().is_terminal() {
            false => Self::Pipe,
            true => {
                let broken = |e: ReadlineError| Error::new(Kind::Failure, format!("cannot use the terminal: {e}"));
                let mut editor = DefaultEditor::new().map_err(broken)?;
                let history = history();
                // A history that cannot be read is an empty one.
                let _ = history.as_ref().map(|path| editor.load_history(path));
                Self::Terminal(Box::new(editor), history)
            }
        })
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(..))
    }

    /// Saves the history.
    pub fn close(&mut self) {
        if let Self::Terminal(editor, Some(path)) = self {
            let _ = path.parent().map(fs::create_dir_all);
            let _ = editor.save_history(path);
        }
    }

    /// The next message, to which `images` images are attached; none at the end of input.
    pub fn message(&mut self, images: usize) -> Result<Option<String>> {
        let mut text = Vec::new();
        let mut block = false;
        loop {
            let line = match self.line(!text.is_empty() || block, images) {
                Ok(Line::Text(line)) => line,
                Ok(Line::Dropped) => return Ok(Some(String::new())),
                Ok(Line::End) if text.is_empty() => return Ok(None),
                Ok(Line::End) => break,
                Err(error) => {
                    self.pass_over(block);
                    return Err(error);
                }
            };
            let trimmed = line.trim_ascii();
            let quote = trimmed == QUOTE;
            if quote && block {
                break;
            }
            if quote {
                block = true;
                continue;
            }
            let more = !block && line.ends_with(b"\\");
            text.extend_from_slice(if more { &line[..line.len() - 1] } else { &line });
            text.push(b'\n');
            if text.len() > MAX_MESSAGE {
                self.pass_over(block);
                return check(&text).map(Some);
            }
            if !block && !more {
                break;
            }
        }
        let hint = match input::is_utf16(&text) {
            true => "iconv -f UTF-16 -t UTF-8 FILE | nextflow chat",
            false => "send it again",
        };
        let bad = |e: std::str::Utf8Error| {
            Error::usage(format!("the message is not UTF-8 (byte {})", e.valid_up_to())).hint(hint)
        };
        Ok(Some(std::str::from_utf8(&text).map_err(bad)?.trim().to_string()))
    }

    /// Skips the rest of a refused block.
    fn pass_over(&mut self, block: bool) {
        if !block {
            return;
        }
        loop {
            match self.line(true, 0) {
                Ok(Line::Text(line)) if line.trim_ascii() == QUOTE => break,
                Ok(Line::Text(_)) => {}
                Ok(_) => break,
                // Another line that is too long.
                Err(error) if error.kind == Kind::Usage => {}
                Err(_) => break,
            }
        }
    }

    fn line(&mut self, more: bool, images: usize) -> Result<Line> {
        let Lines::Terminal(editor, _) = self else { return pipe() };
        let prompt = match (more, images) {
            (true, _) => "… ".to_string(),
            (_, 0) => "> ".to_string(),
            (_, n) => format!("[{n} image{}] > ", if n > 1 { "s" } else { "" }),
        };
        match editor.readline(&prompt) {
            Ok(line) => {
                if line.len() <= MAX_MESSAGE {
                    let _ = editor.add_history_entry(&line);
                }
                Ok(Line::Text(line.into_bytes()))
            }
            Err(ReadlineError::Interrupted) => Ok(Line::Dropped),
            Err(ReadlineError::Eof) => Ok(Line::End),
            // Input typed ahead is lost with the line.
            Err(ReadlineError::Io(e)) if e.kind() == io::ErrorKind::InvalidData => {
                Err(Error::usage("the line is not UTF-8").hint("send it again, with the terminal set to UTF-8"))
            }
            Err(e) => Err(Error::new(Kind::Failure, format!("cannot read the terminal: {e}"))),
        }
    }
}

/// A line of standard input; the rest of one that is too long is passed over.
fn pipe() -> Result<Line> {
    let (mut input, mut line) = (io::stdin().lock(), Vec::new());
    let limit = MAX_MESSAGE as u64 + 2;
    let unreadable = |e: io::Error| {
        // Not the fault of a message: the conversation ends.
        Error::new(Kind::Failure, format!("cannot read standard input: {e}"))
            .hint("echo \"describe it\" | nextflow chat -i photo.jpg")
    };
    if input.by_ref().take(limit).read_until(b'\n', &mut line).map_err(unreadable)? == 0 {
        return Ok(Line::End);
    }
    if line.last() != Some(&b'\n') {
        let mut length = line.len();
        loop {
            let buffer = input.fill_buf()?;
            let end = buffer.iter().position(|b| *b == b'\n');
            let n = end.unwrap_or(buffer.len());
            let last = end.is_some() || n == 0;
            length += n;
            input.consume(n + usize::from(end.is_some()));
            if last {
                break;
            }
        }
        if length > MAX_MESSAGE {
            let message = format!("the message has {length} bytes, the limit is {MAX_MESSAGE}");
            return Err(Error::usage(message).hint("split it into several messages"));
        }
    }
    let line = line.strip_suffix(b"\n").unwrap_or(&line);
    let line = input::without_bom(line);
    Ok(Line::Text(line.strip_suffix(b"\r").unwrap_or(line).to_vec()))
}

/// Where lines are remembered.
fn history() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let state = folder("XDG_STATE_HOME").or_else(|| Some(folder("HOME")?.join(".local/state")))?;
    Some(state.join("nextflow/history"))
}

/// Checks a user's message.
///
/// Errors: usage, for a message that is empty, too long, or not UTF-8.
pub(super) fn check(bytes: &[u8]) -> Result<String> {
    if bytes.len() > MAX_MESSAGE {
        let message = format!("the message has {} bytes, the limit is {MAX_MESSAGE}", bytes.len());
        return Err(Error::usage(message).hint("split it into several messages"));
    }
    let text = std::str::from_utf8(input::without_bom(bytes)).map_err(|e| {
        Error::usage(format!("the message is not UTF-8 (byte {})", e.valid_up_to()))
            .hint("nextflow chat \"what is this?\"")
    })?;
    let control = |c: &char| c.is_control() && !matches!(c, '\n' | '\t' | '\r');
    match text.trim() {
        "" => Err(Error::usage("the message is empty").hint("nextflow chat \"what is this?\"")),
        text => match text.chars().find(control) {
            Some(c) => Err(Error::usage(format!("the message holds the control character {}", c.escape_default()))
                .hint("leave it out")),
            None => Ok(text.into()),
        },
    }
}
