//! Formats that are not read, by name, and how to convert them.

use std::path::Path;

use crate::io::input;

/// How a format becomes a PNG.
#[derive(Clone, Copy)]
enum Way {
    Magick,
    Heif,
    Video,
    Pdf,
    Svg,
    Page,
    Lfs,
}

/// Magic bytes of a format: their offset and value.
const MARKS: [(&str, usize, &[u8], Way); 34] = [
    ("a GIF", 0, b"GIF8", Way::Magick),
    ("a JPEG XL image", 0, b"\xff\x0a", Way::Magick),
    ("a JPEG XL image", 0, b"\0\0\0\x0cJXL ", Way::Magick),
    ("a JPEG 2000 image", 0, b"\0\0\0\x0cjP  ", Way::Magick),
    ("a JPEG 2000 image", 0, b"\xff\x4f\xff\x51", Way::Magick),
    ("a Photoshop file", 0, b"8BPS", Way::Magick),
    ("a GIMP file", 0, b"gimp xcf", Way::Magick),
    ("a PDF", 0, b"%PDF", Way::Pdf),
    ("a PostScript file", 0, b"%!PS", Way::Magick),
    ("a raw photo (Canon CR2)", 8, b"CR\x02", Way::Magick),
    ("a raw photo (Fujifilm RAF)", 0, b"FUJIFILMCCD-RAW", Way::Magick),
    ("a raw photo (Panasonic RW2)", 0, b"IIU\0", Way::Magick),
    ("a raw photo (Olympus ORF)", 0, b"IIRO", Way::Magick),
    ("a TIFF", 0, b"II*\0", Way::Magick),
    ("a TIFF", 0, b"MM\0*", Way::Magick),
    ("a TIFF", 0, b"II+\0", Way::Magick),
    ("a TIFF", 0, b"MM\0+", Way::Magick),
    ("an icon (ICO)", 0, b"\0\0\x01\0", Way::Magick),
    ("an icon (ICNS)", 0, b"icns", Way::Magick),
    ("an OpenEXR image", 0, b"v/1\x01", Way::Magick),
    ("a Radiance HDR image", 0, b"#?RADIANCE", Way::Magick),
    ("a DDS texture", 0, b"DDS ", Way::Magick),
    ("a QOI image", 0, b"qoif", Way::Magick),
    ("a Farbfeld image", 0, b"farbfeld", Way::Magick),
    ("a DICOM image", 128, b"DICM", Way::Magick),
    ("a FITS image", 0, b"SIMPLE  =", Way::Magick),
    ("a WebM or Matroska video", 0, b"\x1a\x45\xdf\xa3", Way::Video),
    ("an AVI video", 8, b"AVI ", Way::Video),
    ("an MPEG video", 0, b"\0\0\x01\xba", Way::Video),
    ("an Ogg file", 0, b"OggS", Way::Video),
    ("a Flash video", 0, b"FLV\x01", Way::Video),
    ("a QuickTime video", 4, b"moov", Way::Video),
    ("a QuickTime video", 4, b"mdat", Way::Video),
    ("a git-lfs pointer, not the file itself", 0, b"version https://git-lfs", Way::Lfs),
];

/// Endings of raw photos that are TIFFs inside.
const RAW: [&str; 9] = ["dng", "nef", "nrw", "arw", "sr2", "pef", "srw", "iiq", "3fr"];

/// The format of a file that begins with `head`, and a command that converts it to PNG; none if the
/// format is unknown.
pub(super) fn named(head: &[u8], path: &Path) -> Option<(&'static str, String)> {
    let (name, way) = kind(head, path)?;
    let stdin = input::is_stdin(path);
    let file = if stdin { "FILE".into() } else { input::quoted(path) };
    let png = if stdin { Path::new("image") } else { Path::new(path.file_stem().unwrap_or(path.as_os_str())) };
    let stem = input::quoted(png);
    let png = input::quoted(&png.with_added_extension("png"));
    let hint = match way {
        // Of several frames or pages the first.
        Way::Magick if stdin => format!("magick FILE[0] {png}, then name {png}"),
        Way::Magick => format!("magick {} {png}, then name {png}", input::quoted(&first_frame(path))),
        Way::Heif => format!("heif-convert {file} {png} (on a Mac: sips -s format png {file} --out {png})"),
        Way::Video => format!("ffmpeg -i {file} -frames:v 1 {png}, then name {png}"),
        Way::Pdf => format!("pdftoppm -png -singlefile {file} {stem}, then name {png}"),
        Way::Svg => format!("rsvg-convert -o {png} {file}, then name {png}"),
        Way::Page => "save the image that the page shows, and name that".into(),
        Way::Lfs => "git lfs pull".into(),
    };
    Some((name, hint))
}

/// The name by which ImageMagick knows the first frame of a file.
fn first_frame(path: &Path) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push("[0]");
    name.into()
}

fn kind(head: &[u8], path: &Path) -> Option<(&'static str, Way)> {
    if head.get(4..8) == Some(b"ftyp") {
        return Some(of_brands(head.get(8..64.min(head.len())).unwrap_or_default()));
    }
    // Two letters that could begin a text, so the header's size is checked too.
    if head.starts_with(b"BM") && matches!(head.get(14..18), Some([12 | 40 | 52 | 56 | 64 | 108 | 124, 0, 0, 0])) {
        return Some(("a BMP", Way::Magick));
    }
    if let [b'P', b'1'..=b'7', b'\n' | b' ' | b'\r' | b'\t', ..] = head {
        return Some(("a PNM image", Way::Magick));
    }
    if let Some((name, .., way)) =
        MARKS.iter().find(|(_, at, mark, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(mark)))
    {
        let raw = |end: &&str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(end));
        let name = if *name == "a TIFF" && RAW.iter().any(raw) { "a raw photo" } else { name };
        return Some((name, *way));
    }
    let text = String::from_utf8_lossy(&head[..head.len().min(1024)]).to_lowercase();
    let text = text.trim_start_matches('\u{feff}').trim_start();
    match () {
        () if text.starts_with("<svg") || text.starts_with('<') && text.contains("<svg") && !text.contains("<html") => {
            Some(("an SVG drawing", Way::Svg))
        }
        () if text.starts_with("<!doctype html") || text.starts_with("<html") => Some(("a web page (HTML)", Way::Page)),
        () => None,
    }
}

/// Files of the ISO base media format name their kind by brands of four letters.
fn of_brands(brands: &[u8]) -> (&'static str, Way) {
    let has = |names: &[&[u8; 4]]| brands.as_chunks::<4>().0.iter().any(|brand| names.contains(&brand));
    match () {
        () if has(&[b"avif", b"avis"]) => ("an AVIF image", Way::Magick),
        () if has(&[b"crx "]) => ("a raw photo (Canon CR3)", Way::Magick),
        () if has(&[b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]) => {
            ("a HEIC image", Way::Heif)
        }
        () if has(&[b"qt  "]) => ("a QuickTime video", Way::Video),
        () => ("an MP4 video", Way::Video),
    }
}
