//! Image files from anywhere: bounded, upright, in plain RGB.

use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use image::{ImageError, RgbImage};

use super::decode::{self, MAX_SIDE};
use super::pillow::{self, ResamplingFilter};
use super::{foreign, jpeg};
use crate::error::{Error, Result};
use crate::io::input;

/// Most memory of images at a time, in bytes: for decoding, and of their pixels.
const MAX_BYTES: u64 = 256 << 20;

/// Reads a PNG, JPEG or WebP file, or a pipe of one; rotates it by its EXIF orientation, and blends
/// transparency with white.
///
/// Errors: usage, if it cannot be read, has another format, is cut off or damaged, or is larger
/// than the limits.
pub fn open(path: &Path) -> Result<RgbImage> {
    open_file(path, MAX_BYTES)
}

fn open_file(path: &Path, bytes: u64) -> Result<RgbImage> {
    const HINT: &str = "check the path: ls, or name another image";
    let unreadable = |e: io::Error| input::unreadable(path, e, HINT);
    let kind = path.metadata().map_err(unreadable)?.file_type();
    if kind.is_dir() {
        return Err(
            Error::usage(format!("{} is a folder, no image", path.display())).hint("name a PNG, JPEG or WebP file")
        );
    }
    match kind.is_file() {
        true => decode(BufReader::new(std::fs::File::open(path).map_err(unreadable)?), path, bytes),
        // A pipe, as of `<(command)`, can be read once and from its beginning.
        false => decode(Cursor::new(input::piped(path, MAX_BYTES, HINT)?), path, bytes),
    }
}

/// As [`open`], or the same of standard input by the name `-`, of whose errors `hint` is the way
/// out: a pipe into the command.
pub fn open_or_read(path: &Path, hint: &str) -> Result<RgbImage> {
    open_within(path, MAX_BYTES, hint)
}

fn open_within(path: &Path, bytes: u64, hint: &str) -> Result<RgbImage> {
    match input::is_stdin(path) {
        true => decode(Cursor::new(input::piped(path, MAX_BYTES, hint)?), path, bytes),
        false => open_file(path, bytes).map_err(|e| match (input::is_address(path), hint.split_once("| ")) {
            (true, Some((_, command))) => e.hint(format!("curl -sL {} | {command}", input::quoted(path))),
            _ => e,
        }),
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

fn decode(mut source: impl BufRead + Seek, path: &Path, bytes: u64) -> Result<RgbImage> {
    let shown = input::shown(path);
    let unreadable =
        |e: io::Error| Error::usage(format!("cannot read {shown}: {e}")).hint("name another image").because(e);
    let head = source.fill_buf().map_err(unreadable)?;
    if let Some((name, hint)) = foreign::named(head, path) {
        return Err(Error::usage(format!("{shown} is {name}; PNG, JPEG and WebP are read")).hint(hint));
    }
    if !head.starts_with(b"\xff\xd8") {
        return decode_format(source, &shown, bytes);
    }
    let mut file = Vec::new();
    source.take(MAX_BYTES).read_to_end(&mut file).map_err(unreadable)?;
    // The decoder comes first, as it refuses images that are too large.
    let image = decode_format(Cursor::new(&file), &shown, bytes)?;
    match jpeg::fault(&file) {
        Some(fault) => Err(Error::usage(format!("cannot read {shown} as an image: {fault}"))
            .hint("get the whole file again, or name another image")),
        None => Ok(image),
    }
}

fn decode_format(source: impl BufRead + Seek, shown: &str, bytes: u64) -> Result<RgbImage> {
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
        Error::usage(format!("cannot read {shown} as an image{before}: {e}")).hint(hint).because(e)
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
    // For a narrow strip the whole scaled image would be gigabytes.
    pillow::resize_part(image, (w, h), ResamplingFilter::Bicubic, ((w - width) / 2, (h - height) / 2), (width, height))
}

/// The place of an image of (width, height) pixels, scaled to fit and centred, within `outer` ones:
/// left, top, width, height.
pub fn place_within((width, height): (u32, u32), outer: (u32, u32)) -> [u32; 4] {
    let fit = (f64::from(outer.0) / f64::from(width)).min(f64::from(outer.1) / f64::from(height));
    let side = |from: u32, most: u32| ((f64::from(from) * fit).round() as u32).clamp(1, most);
    let (w, h) = (side(width, outer.0), side(height, outer.1));
    [(outer.0 - w) / 2, (outer.1 - h) / 2, w, h]
}

/// The whole image at its [place](place_within) within (width, height) pixels, bicubic,
/// antialiased, its outermost pixels repeated around it.
pub fn contain(image: &RgbImage, outer: (u32, u32)) -> RgbImage {
    let [left, top, width, height] = place_within(image.dimensions(), outer);
    let scaled = pillow::resize(image, (width, height), ResamplingFilter::Bicubic);
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
        assert!(open(dir.path()).unwrap_err().message.contains("is a folder"));
        assert!(open(&dir.path().join("none")).unwrap_err().message.contains("cannot read"));
    }

    #[test]
    fn a_jpeg_that_is_cut_off_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images");
        for name in ["baseline.jpg", "progressive.jpg", "restarts.jpg", "grey-progressive.jpg"] {
            let whole = std::fs::read(folder.join(name)).unwrap();
            assert_eq!(open(&folder.join(name)).unwrap().dimensions(), (45, 37));
            let path = dir.path().join(name);
            for tenths in 1..10 {
                std::fs::write(&path, &whole[..whole.len() * tenths / 10]).unwrap();
                let error = open(&path).unwrap_err();
                assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{name}: {tenths} tenths");
            }
            std::fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
            assert!(open(&path).is_ok(), "{name} with more behind it");
        }
    }

    #[test]
    fn other_formats_are_named_with_a_way_out() {
        let dir = tempfile::tempdir().unwrap();
        let brand = |brand: &[u8]| [b"\0\0\0\x18ftyp", brand, b"\0\0\0\0", brand].concat();
        let bmp = [&b"BM"[..], &[0; 12], &[40, 0, 0, 0]].concat();
        for (name, head, what, way) in [
            ("a.heic", brand(b"heic"), "a HEIC image", "heif-convert a.heic a.png"),
            ("a.heif", brand(b"mif1"), "a HEIC image", "heif-convert"),
            ("a.avif", [&brand(b"mif1")[..], b"avif"].concat(), "an AVIF image", "magick 'a.avif[0]' a.png"),
            ("my pic.bmp", bmp, "a BMP", "magick 'my pic.bmp[0]' 'my pic.png'"),
            ("a.gif", b"GIF89a".to_vec(), "a GIF", "magick"),
            ("a.tif", b"II*\0".to_vec(), "a TIFF", "magick"),
            ("a.NEF", b"MM\0*".to_vec(), "a raw photo", "magick"),
            ("a.cr3", brand(b"crx "), "a raw photo", "magick"),
            ("a.jxl", b"\xff\x0a\0".to_vec(), "a JPEG XL image", "magick"),
            (
                "a.svg",
                b"<?xml version=\"1.0\"?>\n<svg xmlns=".to_vec(),
                "an SVG drawing",
                "rsvg-convert -o a.png a.svg",
            ),
            ("a.pdf", b"%PDF-1.7".to_vec(), "a PDF", "pdftoppm -png -singlefile a.pdf a"),
            ("a.psd", b"8BPS".to_vec(), "a Photoshop file", "magick"),
            ("a.mp4", brand(b"isom"), "an MP4 video", "ffmpeg -i a.mp4 -frames:v 1 a.png"),
            ("a.mov", brand(b"qt  "), "a QuickTime video", "ffmpeg"),
            ("a.webm", b"\x1a\x45\xdf\xa3".to_vec(), "a WebM or Matroska video", "ffmpeg"),
            ("a.png", b"<!DOCTYPE html>".to_vec(), "a web page", "save the image"),
            ("a.jpg", b"version https://git-lfs.github.com/spec/v1".to_vec(), "git-lfs pointer", "git lfs pull"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, head).unwrap();
            let error = open(&path).unwrap_err();
            let hint = error.hint.clone().unwrap().replace(&format!("{}/", dir.path().display()), "");
            assert!(error.exit_code() == 2 && error.message.contains(what) && hint.contains(way), "{error}: {hint}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_pipe_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        let to = path.clone();
        let whole = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/images/turned.jpg");
        let writer = std::thread::spawn(move || std::fs::write(to, std::fs::read(whole).unwrap()));
        assert_eq!(open(&path).unwrap().dimensions(), (16, 24));
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn addresses_are_not_fetched() {
        let address = Path::new("https://example.com/a.png?x=1&y=2");
        let error = open_or_read(address, "cat a.png | nextflow chat -i - hi").unwrap_err();
        assert!(error.message.contains("addresses are not fetched"), "{error}");
        let command = "curl -sL 'https://example.com/a.png?x=1&y=2' | nextflow chat -i - hi";
        assert_eq!(error.hint.as_deref(), Some(command));
        assert!(open(address).unwrap_err().hint.unwrap().starts_with("curl -sLO "));
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
