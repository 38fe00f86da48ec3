//! Images on a terminal: kitty's and iTerm2's protocols, sixels, or half blocks, which every terminal has.

use std::io::{self, IsTerminal, Write};

use image::{DynamicImage, RgbImage};
use viuer::Config;

/// Columns of an image.
const WIDTH: u32 = 32;

/// Whether stdout is a terminal that shows images.
pub fn shows() -> bool {
    io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none()
}

/// Shows an image on a terminal, in the best way that it knows; elsewhere nothing.
pub fn show(image: &RgbImage) {
    if !shows() {
        return;
    }
    // A terminal is asked what it knows only where it is one that answers: the question waits for that.
    let (term, is_set) = (std::env::var("TERM").unwrap_or_default(), |name| std::env::var_os(name).is_some());
    let named = |names: &[&str]| names.iter().any(|name| term.contains(name));
    let use_kitty = is_set("KITTY_WINDOW_ID") || named(&["kitty", "ghostty"]);
    let use_sixel = ["XTERM_VERSION", "KONSOLE_VERSION", "WT_SESSION"].into_iter().any(is_set)
        || named(&["foot", "mlterm", "contour", "sixel"]);
    print(image, Config { use_kitty, use_sixel, ..Default::default() });
}

/// Prints an image where the cursor is; how many lines it takes. The file tells as much, so nothing is lost if that fails.
fn print(image: &RgbImage, way: Config) -> u32 {
    let config = Config { absolute_offset: false, width: Some(WIDTH), ..way };
    viuer::print(&DynamicImage::ImageRgb8(image.clone()), &config).map_or(0, |(_, lines)| lines)
}

/// An image that is shown again and again in the same place, as it grows.
#[derive(Debug, Default)]
pub struct Preview {
    /// Above the cursor.
    lines: u32,
}

impl Preview {
    /// Shows how far the image is: in half blocks, which are known to take as many lines as they say.
    pub fn grow(&mut self, image: &RgbImage) {
        self.clear();
        self.lines =
            print(image, Config { use_kitty: false, use_iterm: false, use_sixel: false, ..Default::default() });
    }

    /// Shows the whole image. The next one has a place of its own.
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
