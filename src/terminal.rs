//! What people see: progress and errors on stderr, data alone on stdout, nothing raw from outside.

mod interrupt;
mod picture;

pub use interrupt::{Stop, ignore_file_size_signal, interrupted, interrupts, interrupts_after};
pub use picture::{Preview, cannot_show, show};

use std::borrow::Cow;
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::error::{Error, Kind, Result};
use crate::generate::{Event, schedule::codes};

/// Whether a character drives a terminal: controls (C0, DEL and C1), and what breaks lines or
/// changes the direction of the text around it.
fn drives(c: char) -> bool {
    let direction =
        matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    c.is_control() || direction || matches!(c, '\u{2028}' | '\u{2029}')
}

/// `text` with control characters and direction overrides spelt out, so that no prompt, file name
/// or tensor key can drive a terminal.
pub fn clean(text: &str) -> Cow<'_, str> {
    if !text.contains(drives) {
        return Cow::Borrowed(text);
    }
    let spell = |c: char| if drives(c) { c.escape_default().to_string() } else { c.to_string() };
    Cow::Owned(text.chars().map(spell).collect())
}

/// Prints `error: ...` and `hint: ...` to stderr and, if `verbose`, the causes of the error between
/// them.
pub fn report(error: &Error, verbose: bool) {
    let mut err = anstream::stderr().lock();
    // With stderr closed there is only the exit code.
    let _ = writeln!(err, "\x1b[1;31merror:\x1b[0m {}", clean(&error.message));
    for cause in error.causes().iter().filter(|_| verbose) {
        let _ = writeln!(err, "\x1b[1mcaused by:\x1b[0m {}", clean(cause));
    }
    if let Some(hint) = &error.hint {
        let _ = writeln!(err, "\x1b[1;36mhint:\x1b[0m {}", clean(hint));
    }
}

/// Writes to stdout; `Break` when its reader has gone (`| head`).
pub fn emit(bytes: &[u8]) -> Result<ControlFlow<()>> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(e) => Err(Error::new(Kind::Failure, format!("cannot write to standard output: {e}"))
            .hint("check where it goes, and the free space there: df -h")),
    }
}

/// Writes a piece of a model's answer to stdout: as it is to a pipe; on a terminal with all but its
/// lines and tabs [cleaned](clean).
pub fn speak(text: &str) -> Result<ControlFlow<()>> {
    if !io::stdout().is_terminal() {
        return emit(text.as_bytes());
    }
    let parts: Vec<Cow<str>> = text
        .split_inclusive(['\n', '\t'])
        .flat_map(|part| {
            let end = part.len() - usize::from(part.ends_with(['\n', '\t']));
            [clean(&part[..end]), Cow::Borrowed(&part[end..])]
        })
        .collect();
    emit(parts.concat().as_bytes())
}

/// Writes a line to stderr.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{}", clean(text));
}

/// Writes a path and a newline to stdout: its exact bytes to a pipe, spelt out on a terminal.
pub fn emit_path(path: &Path) -> Result<ControlFlow<()>> {
    let mut line = match io::stdout().is_terminal() {
        true => clean(&path.to_string_lossy()).into_owned().into_bytes(),
        false => path.as_os_str().as_encoded_bytes().to_vec(),
    };
    line.push(b'\n');
    emit(&line)
}

/// Writes one JSON object as one line to stdout.
pub fn emit_json(value: &impl Serialize) -> Result<ControlFlow<()>> {
    let json = serde_json::to_string(value).map_err(|e| Error::new(Kind::Failure, e.to_string()))?;
    emit((escaped(&json) + "\n").as_bytes())
}

/// JSON of one line with everything that drives a terminal as `\u` escapes. JSON itself requires
/// those below 0x20 only.
pub fn escaped(json: &str) -> String {
    let spell = |c: char| match c {
        // Between values there are line breaks, as at the end; none of these characters is beyond
        // 16 bits.
        c if drives(c) && c != '\n' => format!("\\u{:04x}", c as u32),
        c => c.to_string(),
    };
    json.chars().map(spell).collect()
}

/// Whether stderr can redraw a line.
fn can_redraw() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

fn clear_line() {
    if can_redraw() {
        let _ = io::stderr().write_all(b"\r\x1b[K");
    }
}

/// How much is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing.
    Quiet,
    /// One line per image; on a terminal, a line of progress that goes away.
    Normal,
    /// A line per step.
    Verbose,
}

impl Level {
    /// What `--quiet` and `--verbose` ask for.
    pub fn new(quiet: bool, verbose: bool) -> Self {
        match (quiet, verbose) {
            (true, _) => Self::Quiet,
            (_, true) => Self::Verbose,
            _ => Self::Normal,
        }
    }
}

/// Progress on stderr.
pub struct Console {
    level: Level,
    redraw: bool,
    images: u64,
    /// Of the images that are being drawn, the first one's number and the last one's.
    drawn: [u64; 2],
    started: Instant,
}

/// A pass over a small grid costs about as much as this many codes: most of its time goes into
/// reading the weights.
const PASS: usize = 16;

impl Console {
    /// For a run of `images` images.
    pub fn new(level: Level, images: u64) -> Self {
        Self { level, redraw: level == Level::Normal && can_redraw(), images, drawn: [0; 2], started: Instant::now() }
    }

    /// Loads a model of this name, and reports it.
    pub fn load<T>(&mut self, name: &str, load: impl FnOnce() -> Result<T>) -> Result<T> {
        self.progress("loading the model");
        let started = Instant::now();
        let model = load()?;
        self.detail(&format!("loaded {name} in {:.2} s", started.elapsed().as_secs_f64()));
        Ok(model)
    }

    /// Counts the images from the first one again, for another step.
    pub fn restart(&mut self) {
        self.drawn = [0; 2];
    }

    /// Starts `images` more images, which are drawn together.
    pub fn start(&mut self, images: u64) {
        let [_, last] = self.drawn;
        self.drawn = [last + 1, last + images];
        self.started = Instant::now();
    }

    /// Something happened to the current image.
    pub fn event(&mut self, event: &Event) {
        let text = match event {
            Event::Prompt { tokens } => format!("prompt of {tokens} tokens"),
            Event::Scale { codes, scales, drawn } => self.scale(codes.len(), &scales[..*drawn]),
            Event::Decode => "decoding pixels".into(),
            Event::Refine { step, steps } => format!("refining: step {step}/{steps}"),
        };
        let text = match self.drawn {
            _ if self.images <= 1 => text,
            [first, last] if first == last => format!("image {first}/{} · {text}", self.images),
            [first, last] => format!("images {first} to {last} of {} · {text}", self.images),
        };
        self.progress(&text);
        self.detail(&format!("{text} · {:.2} s", self.started.elapsed().as_secs_f64()));
    }

    fn scale(&self, done: usize, scales: &[(usize, usize)]) -> String {
        let (before, all) = (&scales[..done.min(scales.len())], scales);
        let work = |scales: &[(usize, usize)]| (codes(scales) + PASS * scales.len()) as f64;
        let left = self.started.elapsed().as_secs_f64() * (work(all) / work(before).max(1.0) - 1.0);
        format!("scale {done}/{} · {}/{} codes · {left:.1} s left", all.len(), codes(before), codes(all))
    }

    /// The current image is done.
    pub fn finish(&mut self, text: &str) {
        self.clear();
        if self.level != Level::Quiet {
            let _ = writeln!(io::stderr(), "{}", clean(text));
        }
    }

    /// Whether a [detail](Self::detail) is shown.
    pub fn is_verbose(&self) -> bool {
        self.level == Level::Verbose
    }

    /// A line that only `-v` shows.
    pub fn detail(&mut self, text: &str) {
        if self.level == Level::Verbose {
            let _ = writeln!(io::stderr(), "{}", clean(text));
        }
    }

    /// Replaces the line of progress.
    fn progress(&mut self, text: &str) {
        if self.redraw {
            // Without a line break at the edge of a narrow terminal: only one line is taken away
            // again.
            let _ = write!(io::stderr(), "\r\x1b[K\x1b[?7l{}\x1b[?7h", clean(text));
        }
    }

    /// Takes the line of progress away.
    pub fn clear(&mut self) {
        if self.redraw {
            clear_line();
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_drives_a_terminal_gets_through() {
        assert_eq!(clean("a red apple, 红苹果"), "a red apple, 红苹果");
        assert_eq!(clean("\x1b[2Jx\r\n\u{9b}1m\u{202e}"), "\\u{1b}[2Jx\\r\\n\\u{9b}1m\\u{202e}");
        assert_eq!(clean("\u{202a}\u{2066}\u{61c}\u{200f}"), "\\u{202a}\\u{2066}\\u{61c}\\u{200f}");
        let text = "\x1b\u{7f}\u{9b}\u{202e}\u{2069}\u{61c}é";
        let json = escaped(&serde_json::to_string(text).unwrap());
        assert_eq!(json, "\"\\u001b\\u007f\\u009b\\u202e\\u2069\\u061cé\"");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }

    #[test]
    fn progress_counts_scales_and_codes() {
        let console = Console::new(Level::Quiet, 1);
        let text = console.scale(2, &[(1, 1), (2, 2), (3, 3)]);
        assert!(text.starts_with("scale 2/3 · 5/14 codes · "), "{text}");
        assert!(console.scale(3, &[(1, 1), (2, 2), (3, 3)]).ends_with("0.0 s left"));
    }
}
