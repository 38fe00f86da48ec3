//! Image decoding within a bound on its memory: the decoder's buffers, the pixels in the file's
//! format, and RGB.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

use image::error::LimitErrorKind;
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageError, ImageReader, Limits, RgbImage};

/// The largest width and height that is read, in pixels.
pub(super) const MAX_SIDE: u32 = 8192;

/// Decodes an image with at most `bytes` of memory; rotates it by its EXIF orientation, and blends
/// transparency with white.
///
/// Errors: a file that is no image, and [`ImageError::Limits`] for one that is too large.
pub(super) fn decode(mut source: impl BufRead + Seek, bytes: u64) -> Result<RgbImage, ImageError> {
    let work = work(&mut source)?;
    source.rewind()?;
    let mut reader = ImageReader::new(source).with_guessed_format()?;
    let mut limits = Limits::default();
    (limits.max_image_width, limits.max_image_height) = (Some(MAX_SIDE), Some(MAX_SIDE));
    limits.max_alloc = Some(bytes);
    reader.limits(limits);
    let mut decoder = reader.into_decoder()?;
    let orientation = decoder.orientation()?;
    let (width, height) = decoder.dimensions();
    let rgb = 3 * u64::from(width) * u64::from(height);
    // Memory of the conversion beside its input.
    let converted = match decoder.color_type() {
        ColorType::Rgb8 | ColorType::Rgba8 => 0,
        color if color.has_alpha() => rgb / 3 * 4,
        _ => rgb,
    };
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    let turned = if let Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH = orientation { 2 * rgb } else { 0 };
    if decoder.total_bytes().saturating_add(work.max(converted)).max(turned) > bytes {
        return Err(too_large());
    }
    let image = DynamicImage::from_decoder(decoder)?;
    let mut image = DynamicImage::from(match image {
        DynamicImage::ImageRgb8(image) => image,
        image if image.color().has_alpha() => on_white(image.into_rgba8().into_raw(), (width, height)),
        image => image.into_rgb8(),
    });
    image.apply_orientation(orientation);
    Ok(image.into_rgb8())
}

fn too_large() -> ImageError {
    ImageError::Limits(LimitErrorKind::InsufficientMemory.into())
}

/// RGBA bytes on white, in the same memory.
fn on_white(mut bytes: Vec<u8>, (width, height): (u32, u32)) -> RgbImage {
    let pixels = bytes.len() / 4;
    for i in 0..pixels {
        let [r, g, b, a] = [0, 1, 2, 3].map(|c| u32::from(bytes[4 * i + c]));
        let blended = [r, g, b].map(|v| ((v * a + 255 * (255 - a) + 127) / 255) as u8);
        bytes[3 * i..3 * i + 3].copy_from_slice(&blended);
    }
    bytes.truncate(3 * pixels);
    bytes.shrink_to_fit();
    RgbImage::from_raw(width, height, bytes).unwrap_or_default()
}

/// Bytes of a file's decoder beside its output, computed from its headers; 0 for PNG, which is
/// decoded row by row, and for files that cannot be read: the decoder reports why.
fn work(source: &mut (impl BufRead + Seek)) -> Result<u64, ImageError> {
    let mut magic = [0; 12];
    let work = match source.read_exact(&mut magic) {
        Ok(()) if magic.starts_with(b"\xff\xd8") => {
            source.seek(SeekFrom::Start(2))?;
            // The decoder has the file in memory; so has the check for files that are cut off.
            jpeg(source).map(|work| Ok(work + 2 * source.seek(SeekFrom::End(0))?))
        }
        Ok(()) if magic.starts_with(b"RIFF") && magic.ends_with(b"WEBP") => webp(source),
        _ => return Ok(0),
    };
    match work {
        Ok(work) => work,
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
        Err(e) => Err(e.into()),
    }
}

/// Of a JPEG, from its second marker on: the coefficients of all blocks, two bytes each, if it is
/// progressive or its components come one after the other.
fn jpeg(source: &mut (impl BufRead + Seek)) -> io::Result<u64> {
    let (mut coefficients, mut components, mut progressive) = (0, 0, false);
    loop {
        // Anything may be between segments.
        source.skip_until(0xff)?;
        let marker = byte(source)?;
        if matches!(marker, 0 | 1 | 0xd0..=0xd8 | 0xff) {
            if marker == 0xff {
                source.seek_relative(-1)?;
            }
            continue;
        }
        let length = i64::from(u16::from_be_bytes(array(source)?)) - 2;
        match marker {
            0xd9 => return Ok(0),
            0xc0..=0xcf if ![0xc4, 0xc8, 0xcc].contains(&marker) => {
                let [_, h0, h1, w0, w1, count] = array(source)?;
                let mut samplings = Vec::new();
                for _ in 0..count.min(4) {
                    let [_, sampling, _] = array(source)?;
                    samplings.push((u64::from(sampling >> 4).max(1), u64::from(sampling & 15).max(1)));
                }
                let most = |of: fn(&(u64, u64)) -> u64| samplings.iter().map(of).max().unwrap_or(1);
                let side = |a: u8, b: u8, sampling: u64| u64::from(u16::from_be_bytes([a, b])).div_ceil(8 * sampling);
                let mcus = side(w0, w1, most(|s| s.0)) * side(h0, h1, most(|s| s.1));
                coefficients = mcus * samplings.iter().map(|(h, v)| 64 * h * v).sum::<u64>();
                (components, progressive) = (count, matches!(marker & 3, 2));
                source.seek_relative(length - 6 - 3 * i64::from(count.min(4)))?;
            }
            0xda => {
                let whole = byte(source)? >= components && !progressive;
                return Ok(if whole { 0 } else { 2 * coefficients });
            }
            _ => source.seek_relative(length.max(0))?,
        }
    }
}

/// Of the chunks of a WebP file up to the first image.
///
/// Errors: an image that is larger than its canvas, which is decoded before it is compared.
fn webp(source: &mut (impl BufRead + Seek)) -> io::Result<Result<u64, ImageError>> {
    let (mut canvas, mut animated, mut transparent) = (None, false, false);
    loop {
        let (name, length): ([u8; 4], u32) = (array(source)?, u32::from_le_bytes(array(source)?));
        let mut head = Vec::new();
        let skip = match &name {
            b"ANMF" => {
                // The chunks of the frame follow.
                animated = true;
                source.seek_relative(16)?;
                continue;
            }
            b"VP8X" | b"VP8 " | b"VP8L" => source.take(10.min(length.into())).read_to_end(&mut head)?,
            _ => 0,
        };
        let number = |at: usize, bytes: usize| head[at..at + bytes].iter().rev().fold(0, |n, b| n << 8 | u32::from(*b));
        let size = match &name {
            b"VP8X" if skip == 10 => {
                canvas = Some((number(4, 3) + 1, number(7, 3) + 1));
                None
            }
            b"VP8 " if skip == 10 => Some((number(6, 2) & 0x3fff, number(8, 2) & 0x3fff)),
            b"VP8L" if skip >= 5 => Some(((number(1, 4) & 0x3fff) + 1, (number(1, 4) >> 14 & 0x3fff) + 1)),
            b"ALPH" => {
                transparent = true;
                None
            }
            _ => None,
        };
        if let Some((width, height)) = size {
            let (w, h) = canvas.unwrap_or((width, height));
            if width > w || height > h {
                return Ok(Err(too_large()));
            }
            // Halves of a byte for each pixel: the planes of a lossy image, or the pixels of a
            // lossless one; of the transparency as an image and alone; of an animation the canvas
            // and a frame.
            let image = if &name == b"VP8L" { 8 } else { 3 + if transparent { 10 } else { 0 } };
            let halves = image + if animated { 16 } else { 0 };
            return Ok(Ok(u64::from(w).next_multiple_of(16) * u64::from(h).next_multiple_of(16) * halves / 2));
        }
        source.seek_relative(i64::from(length) + i64::from(length & 1) - skip as i64)?;
    }
}

fn byte(source: &mut impl Read) -> io::Result<u8> {
    array::<1>(source).map(|[byte]| byte)
}

fn array<const N: usize>(source: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    source.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use image::{DynamicImage, GrayImage, ImageFormat, Luma, Rgba, RgbaImage};

    use super::*;

    const MB: u64 = 1 << 20;

    fn limited(bytes: &[u8], most: u64) -> bool {
        matches!(decode(Cursor::new(bytes), most), Err(ImageError::Limits(_)))
    }

    fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(Vec::new());
        image.into().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    #[test]
    fn what_is_made_of_pixels_counts() {
        let (w, h) = (512, 256);
        let pixels = u64::from(w * h);
        // Bytes a pixel: as decoded, and beside that as RGB, or RGBA where there is transparency of
        // another kind.
        for (image, bytes) in [
            (DynamicImage::new_luma8(w, h), 1 + 3),
            (DynamicImage::new_luma_a8(w, h), 2 + 4),
            (DynamicImage::new_rgb8(w, h), 3),
            (DynamicImage::new_rgba8(w, h), 4),
            (DynamicImage::new_luma16(w, h), 2 + 3),
            (DynamicImage::new_luma_a16(w, h), 4 + 4),
            (DynamicImage::new_rgb16(w, h), 6 + 3),
            (DynamicImage::new_rgba16(w, h), 8 + 4),
        ] {
            let color = image.color();
            let png = encoded(image, ImageFormat::Png);
            assert!(limited(&png, pixels * bytes - 1), "{color:?}");
            let white = if color.has_alpha() { [255; 3] } else { [0; 3] };
            assert_eq!(decode(Cursor::new(&png), pixels * bytes).unwrap().get_pixel(1, 1).0, white, "{color:?}");
        }
        let webp = encoded(DynamicImage::new_rgb8(w, h), ImageFormat::WebP);
        assert!(limited(&webp, pixels * 7 - 1) && decode(Cursor::new(&webp), pixels * 7).is_ok());
        let jpeg = encoded(DynamicImage::new_rgb8(w, h), ImageFormat::Jpeg);
        let file = 2 * jpeg.len() as u64;
        assert!(limited(&jpeg, pixels * 3 + file - 1) && decode(Cursor::new(&jpeg), pixels * 3 + file).is_ok());
    }

    #[test]
    fn the_palette_of_8192_pixels_a_side_just_fits() {
        let png = include_bytes!("../../tests/data/hostile/palette-8192-with-transparency.png");
        assert!(limited(png, 256 * MB - 1));
        let image = decode(Cursor::new(png), 256 * MB).unwrap();
        assert_eq!((image.dimensions(), image.as_raw().capacity()), ((8192, 8192), 3 * 8192 * 8192));
    }

    #[test]
    fn transparency_becomes_white_in_place() {
        let image = RgbaImage::from_fn(5, 3, |x, y| Rgba([x as u8 * 50, y as u8 * 100, 7, (x * y * 30) as u8]));
        let got = on_white(image.clone().into_raw(), (5, 3));
        for (x, y, pixel) in got.enumerate_pixels() {
            let [r, g, b, a] = image.get_pixel(x, y).0.map(u32::from);
            assert_eq!(pixel.0, [r, g, b].map(|v| ((v * a + 255 * (255 - a) + 127) / 255) as u8));
        }
    }

    #[test]
    fn the_work_of_decoders_counts() {
        // Headers alone: 8192 x 8192 pixels, three components of 4:2:0.
        let jpeg = |frame: u8, scan: u8| {
            let components = b"\x03\x01\x22\x00\x02\x11\x00\x03\x11\x00";
            let mut bytes = b"\xff\xd8\xff\xfe\0\x06text".to_vec();
            bytes.extend([&[0xff, frame, 0, 17, 8, 0x20, 0, 0x20, 0], &components[..]].concat());
            bytes.extend(
                [&[0xff, 0xda, 0, 6 + 2 * scan, scan], &b"\x01\0\x02\0\x03\0"[..2 * usize::from(scan)], b"\0\x3f\0"]
                    .concat(),
            );
            bytes
        };
        let work = |bytes: &[u8]| work(&mut Cursor::new(bytes)).unwrap();
        let file = |bytes: &[u8]| 2 * bytes.len() as u64;
        assert_eq!(work(&jpeg(0xc0, 3)), file(&jpeg(0xc0, 3)));
        assert_eq!(work(&jpeg(0xc2, 3)), file(&jpeg(0xc2, 3)) + 192 * MB);
        assert_eq!(work(&jpeg(0xc0, 1)), file(&jpeg(0xc0, 1)) + 192 * MB);
        assert!(limited(&jpeg(0xc2, 3), 256 * MB));
        // A canvas of 16 x 16, and in it an image of 16383 x 16383.
        let chunk = |name: &[u8], data: &[u8]| [name, &(data.len() as u32).to_le_bytes(), data].concat();
        let webp = |chunks: &[u8]| [b"RIFF", &(chunks.len() as u32 + 4).to_le_bytes(), b"WEBP", chunks].concat();
        let canvas = chunk(b"VP8X", &[0, 0, 0, 0, 15, 0, 0, 15, 0, 0]);
        let lossy = chunk(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f");
        assert!(limited(&webp(&[canvas.clone(), lossy.clone()].concat()), 256 * MB));
        let frame = [b"ANMF", &40u32.to_le_bytes(), &[0; 16][..], &lossy].concat();
        assert!(limited(&webp(&[canvas, frame].concat()), 256 * MB));
        assert!(limited(&webp(&chunk(b"VP8L", b"\x2f\xff\xff\xff\x07\0")), 256 * MB));
        for end in 0..40 {
            let _ = decode(Cursor::new(&jpeg(0xc2, 3)[..end]), MB);
        }
        let grey = GrayImage::from_pixel(9, 9, Luma([7]));
        let whole = encoded(grey, ImageFormat::Png);
        assert_eq!(work(&whole), 0);
    }
}
