//! Image files from anywhere: bounded, upright, in plain RGB.

use std::io::{self, BufRead, BufReader, Cursor, Seek};
use std::path::{Path, PathBuf};

use image::{ImageError, RgbImage};

use super::decode::{self, MAX_SIDE};
use super::pillow::{self, Filter};
use crate::error::{Error, Result};
use crate::input;

/// The most memory, in bytes, that images take at once: what they are decoded with, and their pixels.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a PNG, JPEG or WebP file, turned as its EXIF says, what is transparent on white.
///
/// Errors: usage, if the file cannot be read, is no such image, or is larger than the limits.
pub fn open(path: &Path) -> Result<RgbImage> {
    open_file(path, MAX_BYTES)
}

fn open_file(path: &Path, bytes: u64) -> Result<RgbImage> {
    let shown = path.display().to_string();
    let unreadable = |e: io::Error| {
        Error::usage(format!("cannot read {shown}: {e}")).hint("check the path: ls, or name another image")
    };
    // Opening a pipe would wait for a writer.
    if !path.metadata().map_err(unreadable)?.is_file() {
        return Err(Error::usage(format!("{shown} is not a file")).hint("name a PNG, JPEG or WebP file"));
    }
    decode(BufReader::new(std::fs::File::open(path).map_err(unreadable)?), &shown, bytes)
}

/// As [`open`], or the same of standard input by the name `-`, of whose errors `hint` is the way out.
pub fn open_or_read(path: &Path, hint: &str) -> Result<RgbImage> {
    open_within(path, MAX_BYTES, hint)
}

fn open_within(path: &Path, bytes: u64, hint: &str) -> Result<RgbImage> {
    match input::is_stdin(path) {
        true => decode(Cursor::new(input::piped(path, MAX_BYTES, hint)?), &input::shown(path), bytes),
        false => open_file(path, bytes),
    }
}

/// The images of some paths, in memory together: all of them within the limit of one.
///
/// Errors: those of [`open_or_read`].
pub fn open_all(paths: &[PathBuf], hint: &str) -> Result<Vec<RgbImage>> {
    let mut left = MAX_BYTES;
    let open = |path: &PathBuf| {
        let image = open_within(path, left, hint)?;
        left = left.saturating_sub(image.as_raw().len() as u64);
        Ok(image)
    };
    paths.iter().map(open).collect()
}

fn decode(source: impl BufRead + Seek, shown: &str, bytes: u64) -> Result<RgbImage> {
    let image = decode::decode(source, bytes).map_err(|e| {
        let most = MAX_BYTES >> 20;
        let (before, hint) = match &e {
            ImageError::Limits(_) if bytes < MAX_BYTES => (
                format!(" after others that take {} of {most} MB", (MAX_BYTES - bytes) >> 20),
                format!("scale them down: {most} MB of pixels are read, those of all images together"),
            ),
            ImageError::Limits(_) => (
                String::new(),
                format!("scale it down: up to {MAX_SIDE}x{MAX_SIDE} pixels and {most} MB of them are read"),
            ),
            _ => (String::new(), "name a PNG, JPEG or WebP file".into()),
        };
        Error::usage(format!("cannot read {shown} as an image{before}: {e}")).hint(hint)
    })?;
    if image.width() == 0 || image.height() == 0 {
        return Err(Error::usage(format!("{shown} has no pixels")).hint("name another image"));
    }
    Ok(image)
}

/// The image scaled to cover `width` x `height` pixels, its middle cut out: bicubic, antialiased.
pub fn cover(image: &RgbImage, width: u32, height: u32) -> RgbImage {
    if image.dimensions() == (width, height) {
        return image.clone();
    }
    let (w, h) = (f64::from(image.width()), f64::from(image.height()));
    let scale = (f64::from(width) / w).max(f64::from(height) / h);
    let [w, h] = [(w, width), (h, height)].map(|(from, to)| ((from * scale).round() as u32).max(to));
    // Of a strip the whole would be gigabytes.
    pillow::resize_part(image, (w, h), Filter::Bicubic, ((w - width) / 2, (h - height) / 2), (width, height))
}

/// Where an image of (width, height) pixels lies within `outer` ones if it is scaled until it fits and stands in the middle: left,
/// top, width, height.
pub fn place_within((width, height): (u32, u32), outer: (u32, u32)) -> [u32; 4] {
    let fit = (f64::from(outer.0) / f64::from(width)).min(f64::from(outer.1) / f64::from(height));
    let side = |from: u32, most: u32| ((f64::from(from) * fit).round() as u32).clamp(1, most);
    let (w, h) = (side(width, outer.0), side(height, outer.1));
    [(outer.0 - w) / 2, (outer.1 - h) / 2, w, h]
}

/// The whole image at its [place](place_within) within (width, height) pixels, bicubic, antialiased, its outermost pixels repeated
/// around it.
pub fn contain(image: &RgbImage, outer: (u32, u32)) -> RgbImage {
    let [left, top, width, height] = place_within(image.dimensions(), outer);
    let scaled = pillow::resize(image, (width, height), Filter::Bicubic);
    let inside = |at: u32, from: u32, length: u32| at.saturating_sub(from).min(length - 1);
    RgbImage::from_fn(outer.0, outer.1, |x, y| *scaled.get_pixel(inside(x, left, width), inside(y, top, height)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Rgb, Rgba, RgbaImage};

    #[test]
    fn transparency_is_white_and_grey_is_rgb() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.png");
        let mut rgba = RgbaImage::from_pixel(3, 2, Rgba([10, 20, 30, 255]));
        rgba.put_pixel(0, 0, Rgba([10, 20, 30, 0]));
        rgba.put_pixel(1, 0, Rgba([0, 100, 200, 128]));
        rgba.save(&path).unwrap();
        let image = open(&path).unwrap();
        assert_eq!(image.dimensions(), (3, 2));
        assert_eq!(
            [image[(0, 0)], image[(1, 0)], image[(2, 1)]].map(|p| p.0),
            [[255; 3], [127, 177, 227], [10, 20, 30]]
        );
        image::ImageBuffer::from_pixel(2, 2, image::Luma([0xffffu16])).save(&path).unwrap();
        assert_eq!(open(&path).unwrap()[(1, 1)], Rgb([255; 3]));
    }

    /// Files that Pillow wrote: white, 24 x 16, the upper left quarter red.
    #[test]
    fn inks_turns_and_first_frames_are_understood() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images");
        for (name, size, red) in [
            ("cmyk.jpg", (24, 16), (3, 3)),
            ("animated.webp", (24, 16), (3, 3)),
            ("animated.png", (24, 16), (3, 3)),
            // Its EXIF says that its left is up.
            ("turned.jpg", (16, 24), (12, 3)),
        ] {
            let image = open(&folder.join(name)).unwrap();
            assert_eq!(image.dimensions(), size, "{name}");
            let like = |at: (u32, u32), rgb: [u8; 3]| (0..3).all(|c| image[at].0[c].abs_diff(rgb[c]) < 40);
            assert!(like(red, [220, 30, 35]) && like((3, size.1 - 3), [255; 3]), "{name}: {:?}", image[red]);
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let mut png = Vec::new();
        let mut encoder = png::Encoder::new(&mut png, 100_000, 100_000);
        encoder.set_color(png::ColorType::Grayscale);
        drop(encoder.write_header().unwrap());
        let mut wide = Vec::new();
        let mut encoder = png::Encoder::new(&mut wide, 8192, 8192);
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_depth(png::BitDepth::Sixteen);
        encoder.write_header().unwrap().write_chunk(png::chunk::IDAT, &[0; 8]).unwrap();
        let cases: [(&str, &[u8], &str); 5] = [
            ("wide", &wide, "memory"),
            ("empty", b"", "as an image"),
            ("text", b"hello", "as an image"),
            ("bomb", &png, "limit"),
            ("cut", &png[..20], "as an image"),
        ];
        for (name, bytes, part) in cases {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = open(&path).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.to_lowercase().contains(part) && error.hint.is_some(), "{name}: {error}");
        }
        assert!(open(dir.path()).unwrap_err().message.contains("is not a file"));
        assert!(open(&dir.path().join("none")).unwrap_err().message.contains("cannot read"));
    }

    #[test]
    fn covering_keeps_the_middle() {
        let mut image = RgbImage::from_pixel(40, 10, Rgb([0; 3]));
        (15..25).for_each(|x| (0..10).for_each(|y| image.put_pixel(x, y, Rgb([200; 3]))));
        let square = cover(&image, 20, 20);
        assert_eq!(square.dimensions(), (20, 20));
        assert!(square.pixels().skip(2).take(16).all(|p| p.0[0] > 190), "{square:?}");
        assert_eq!(cover(&image, 1, 64).dimensions(), (1, 64));
        assert_eq!(cover(&image, 40, 10), image);
        // The whole would have 2 GB.
        assert_eq!(cover(&RgbImage::new(1, 8192), 512, 128).dimensions(), (512, 128));
    }
}
