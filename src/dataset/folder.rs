//! A library of a folder of images with their captions beside them, as common trainers take it.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use image::Pixel;
use rayon::prelude::*;

use super::{BYTES, CaptionedImage, Concept, Dataset, SIDE, held_out};
use crate::error::{Error, Result};
use crate::io::input::{quoted, without_bom};
use crate::pixels;

/// Endings of files that are read as images, in small letters or capitals.
const IMAGES: [&str; 4] = ["png", "jpg", "jpeg", "webp"];

impl Dataset {
    /// The PNG, JPEG and WebP files in `folder`, in the order of their names; the captions of
    /// `x.png` are the lines of `x.txt` that are not blank. Images with the same captions are
    /// pictures of one concept, which is [held out](held_out) by the first of them. Pictures are
    /// opaque, what was transparent is white; folders in the folder are left alone.
    ///
    /// Errors: usage, for a folder that cannot be read or has no images, and the first image by
    /// name that cannot be read or has no captions.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let paths = images(folder)?;
        let mut rgba = vec![0; paths.len() * BYTES];
        let read = |(picture, path): (&mut [u8], &PathBuf)| {
            let captions = captions(path)?;
            let image = pixels::contain(&pixels::open(path)?, (SIDE as u32, SIDE as u32));
            let pixels = picture.chunks_exact_mut(4).zip(image.pixels());
            pixels.for_each(|(to, pixel)| to.copy_from_slice(&pixel.to_rgba().0));
            Ok(captions)
        };
        // Threads find errors in any order; the first by name is reported.
        let read: Vec<Result<Vec<String>>> = rgba.par_chunks_exact_mut(BYTES).zip(&paths).map(read).collect();
        let (mut concepts, mut pictures, mut known) = (Vec::new(), Vec::new(), HashMap::new());
        for captions in read {
            let captions = captions?;
            let concept = *known.entry(captions.clone()).or_insert(concepts.len());
            if concept == concepts.len() {
                let (label, held_out) = (captions[0].clone(), held_out(&captions[0]));
                concepts.push(Concept { label, captions, everyday: true, held_out, ..Concept::default() });
            }
            pictures.push(CaptionedImage { concept, style: None });
        }
        Self::new(concepts, pictures, rgba)
    }
}

/// The images in a folder, by name. There are some.
fn images(folder: &Path) -> Result<Vec<PathBuf>> {
    let hint = "name a folder of images: nextflow train data --folder DIR";
    let failed = |e| Error::usage(format!("cannot read {}: {e}", folder.display())).hint(hint);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        if ending.is_some_and(|ending| IMAGES.contains(&ending.as_str())) {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Error::usage(format!("{} holds no PNG, JPEG or WebP files", folder.display())).hint(hint));
    }
    paths.sort();
    Ok(paths)
}

/// The captions of an image, as the file beside it has them. There are some.
fn captions(image: &Path) -> Result<Vec<String>> {
    let path = image.with_extension("txt");
    let (shown, file) = (path.display(), quoted(&path));
    let none = |why: String| {
        Error::usage(format!("{} has no captions: {why}", image.display())).hint(format!("echo 'a red apple' > {file}"))
    };
    let bytes = std::fs::read(&path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => none(format!("there is no {shown}")),
        _ => Error::usage(format!("cannot read {shown}: {e}")).hint(format!("ls -l {file}")),
    })?;
    let text = std::str::from_utf8(without_bom(&bytes)).map_err(|e| {
        Error::usage(format!("{shown} is not UTF-8 (byte {})", e.valid_up_to()))
            .hint(format!("if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file}"))
    })?;
    let captions: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_string).collect();
    if captions.is_empty() {
        return Err(none(format!("{shown} is blank")));
    }
    Ok(captions)
}

#[cfg(test)]
mod tests {
    use image::{ImageFormat, Rgb, RgbImage, RgbaImage};

    use super::*;

    fn write(folder: &Path, name: &str, image: &RgbImage, format: ImageFormat, captions: &str) {
        let path = folder.join(name);
        image.save_with_format(&path, format).unwrap();
        std::fs::write(path.with_extension("txt"), captions).unwrap();
    }

    fn rgb(library: &Dataset, picture: usize) -> Vec<u8> {
        assert!(library.is_opaque(picture));
        library.over(picture, [0; 3])
    }

    #[test]
    fn a_folder_becomes_a_library_that_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let whole = RgbImage::from_fn(128, 128, |x, y| Rgb([x as u8, y as u8, (x ^ y) as u8]));
        // Red on the left and blue on the right, half as high as wide.
        let wide = RgbImage::from_fn(8, 4, |x, _| Rgb(if x < 4 { [200, 0, 0] } else { [0, 0, 200] }));
        let tiny = RgbImage::from_pixel(1, 1, Rgb([9, 99, 199]));
        // What is written last comes first.
        write(dir.path(), "c.png", &tiny, ImageFormat::Png, "my dog Rex on a sofa\n沙发上的狗\n");
        write(dir.path(), "b.WEBP", &wide, ImageFormat::WebP, "my bicycle");
        write(dir.path(), "a.png", &whole, ImageFormat::Png, "\u{feff}my dog Rex on a sofa\r\n\r\n  沙发上的狗 \r\n");
        std::fs::write(dir.path().join("notes.txt"), "not of an image").unwrap();
        std::fs::create_dir(dir.path().join("more")).unwrap();

        let library = Dataset::from_folder(dir.path()).unwrap();
        let path = dir.path().join("library.safetensors");
        library.save(&path).unwrap();
        let read = Dataset::load(&path).unwrap();
        assert_eq!((&read.concepts, &read.pictures), (&library.concepts, &library.pictures));
        assert_eq!(read.captions(0), ["my dog Rex on a sofa", "沙发上的狗"]);
        assert_eq!(read.captions(1), ["my bicycle"]);
        assert_eq!(read.pictures.iter().map(|p| p.concept).collect::<Vec<_>>(), [0, 1, 0]);
        assert_eq!(
            read.concepts.iter().map(|c| (c.everyday, c.held_out)).collect::<Vec<_>>(),
            [(true, false), (true, true)]
        );

        assert!(rgb(&read, 0) == whole.into_raw());
        let bicycle = RgbImage::from_raw(128, 128, rgb(&read, 1)).unwrap();
        for y in [0, 31, 32, 64, 95, 96, 127] {
            assert_eq!((bicycle[(0, y)], bicycle[(127, y)]), (Rgb([200, 0, 0]), Rgb([0, 0, 200])), "row {y}");
        }
        assert!(rgb(&read, 2).chunks(3).all(|p| p == [9, 99, 199]));
    }

    #[test]
    fn images_of_any_ratio_become_squares_and_clear_ones_white() {
        let dir = tempfile::tempdir().unwrap();
        let high = RgbImage::from_fn(2, 4, |_, y| Rgb([if y < 2 { 255 } else { 0 }; 3]));
        write(dir.path(), "a.png", &high, ImageFormat::Png, "half a wall");
        let mut clear = RgbaImage::from_pixel(128, 128, image::Rgba([10, 20, 30, 0]));
        clear.put_pixel(0, 0, image::Rgba([10, 20, 30, 255]));
        clear.save(dir.path().join("b.png")).unwrap();
        std::fs::write(dir.path().join("b.txt"), "a corner").unwrap();
        let library = Dataset::from_folder(dir.path()).unwrap();
        let wall = rgb(&library, 0);
        assert_eq!((&wall[..3], &wall[wall.len() - 3..]), (&[255; 3][..], &[0; 3][..]));
        let corner = rgb(&library, 1);
        assert_eq!((&corner[..3], &corner[corner.len() - 3..]), (&[10, 20, 30][..], &[255; 3][..]));
    }

    #[test]
    fn faults_are_told_with_the_way_out() {
        let image = RgbImage::new(2, 2);
        let fault = |prepare: &dyn Fn(&Path)| {
            let dir = tempfile::tempdir().unwrap();
            // In the order of names this comes after all faults.
            write(dir.path(), "z.png", &image, ImageFormat::Png, "");
            prepare(dir.path());
            let error = Dataset::from_folder(dir.path()).err().unwrap();
            assert_eq!(error.exit_code(), 2);
            (error.message, error.hint.unwrap())
        };
        let captioned = |captions: &'static [u8]| {
            let image = &image;
            move |dir: &Path| {
                image.save(dir.join("a.png")).unwrap();
                std::fs::write(dir.join("a.txt"), captions).unwrap();
            }
        };
        let (message, hint) = fault(&captioned(b" \n\n"));
        assert!(message.contains("a.png has no captions") && message.ends_with("a.txt is blank"), "{message}");
        assert!(hint.starts_with("echo ") && hint.ends_with("a.txt"), "{hint}");
        let (message, hint) = fault(&captioned(b"caf\xff"));
        assert!(message.ends_with("a.txt is not UTF-8 (byte 3)") && hint.contains("iconv"), "{message}: {hint}");
        let (message, hint) = fault(&|dir| image.save(dir.join("a.png")).unwrap());
        assert!(message.contains("a.png has no captions: there is no"), "{message}");
        assert!(hint.starts_with("echo ") && hint.ends_with("a.txt"), "{hint}");
        let (message, _) = fault(&|dir| {
            std::fs::write(dir.join("a.png"), "no image").unwrap();
            std::fs::write(dir.join("a.txt"), "a red apple").unwrap();
        });
        assert!(message.contains("a.png as an image"), "{message}");
        let (message, hint) = fault(&|dir| std::fs::remove_file(dir.join("z.png")).unwrap());
        assert!(message.contains("holds no PNG") && hint.contains("--folder"), "{message}: {hint}");
        let (message, hint) = fault(&|dir| std::fs::remove_dir_all(dir).unwrap());
        assert!(message.contains("cannot read") && hint.contains("--folder"), "{message}: {hint}");
    }
}
