//! Images on a terminal: kitty's and iTerm2's protocols, sixels, or half blocks, which every
//! terminal has.

use std::io::{self, IsTerminal, Write};

use image::{DynamicImage, RgbImage};
use viuer::Config;

/// Columns of an image, where there are as many.
const WIDTH: u32 = 32;
/// Lines kept free below a growing preview, for the status line.
const BELOW: u32 = 2;

/// Why stdout shows no images; nothing where it does.
pub fn cannot_show() -> Option<&'static str> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    match () {
        () if !io::stdout().is_terminal() => Some("standard output is not a terminal"),
        () if set("NO_COLOR").is_some() => Some("NO_COLOR is set"),
        () if set("TERM").is_some_and(|term| term == "dumb") => Some("TERM is dumb"),
        () => None,
    }
}

/// Shows an image on a terminal, in the best way that it knows; elsewhere nothing.
pub fn show(image: &RgbImage) {
    if cannot_show().is_some() {
        return;
    }
    // Only terminals that are known to answer are queried, since the query waits for the answer.
    // Programs within a terminal inherit its variables, but set their own TERM.
    let term = std::env::var("TERM").unwrap_or_default();
    let is_set = |name| term.starts_with("xterm") && std::env::var_os(name).is_some();
    let named = |names: &[&str]| names.iter().any(|name| term.contains(name));
    let use_kitty = is_set("KITTY_WINDOW_ID") || named(&["kitty", "ghostty"]);
    let use_sixel = ["XTERM_VERSION", "KONSOLE_VERSION", "WT_SESSION"].into_iter().any(is_set)
        || named(&["foot", "mlterm", "contour", "sixel"]);
    print(image, WIDTH.min(size().0), Config { use_kitty, use_sixel, ..Default::default() });
}

/// Columns and lines of the terminal.
fn size() -> (u32, u32) {
    let (columns, lines) = viuer::terminal_size();
    (columns.into(), lines.into())
}

/// Prints an image at the cursor; returns its height in lines. Failing is harmless: the image is in
/// its file.
fn print(image: &RgbImage, width: u32, way: Config) -> u32 {
    let config = Config { absolute_offset: false, width: Some(width), ..way };
    viuer::print(&DynamicImage::ImageRgb8(image.clone()), &config).map_or(0, |(_, lines)| lines)
}

/// An image that is shown again and again as it grows.
#[derive(Debug)]
pub struct Preview {
    /// In the same place.
    in_place: bool,
    /// Above the cursor.
    lines: u32,
}

impl Preview {
    /// A preview that is redrawn in place, or printed below the status lines.
    pub fn new(in_place: bool) -> Self {
        Self { in_place, lines: 0 }
    }

    /// Shows the image so far in half blocks, whose height in lines is known; or nothing, where it
    /// would not fit.
    pub fn grow(&mut self, image: &RgbImage) {
        self.clear();
        let ((columns, lines), (w, h)) = (size(), image.dimensions());
        // A character is as high as two columns are wide.
        let width = WIDTH.min(columns).min(2 * lines.saturating_sub(BELOW) * w / h.max(1));
        let half_blocks = Config { use_kitty: false, use_iterm: false, use_sixel: false, ..Default::default() };
        let lines = if width > 0 { print(image, width, half_blocks) } else { 0 };
        self.lines = if self.in_place { lines } else { 0 };
    }

    /// Shows the finished image. The next one is printed below it.
    pub fn end(&mut self, image: &RgbImage) {
        self.clear();
        show(image);
    }

    fn clear(&mut self) {
        let mut out = io::stdout();
        if self.lines > 0 {
            let _ = write!(out, "\r\x1b[{}A\x1b[J", self.lines).and_then(|()| out.flush());
        }
        self.lines = 0;
    }
}
