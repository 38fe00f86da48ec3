//! The blind naming test: a sheet of numbered images that somebody names who has not seen the
//! prompts.

use image::{Rgb, RgbImage, imageops};

/// What is drawn, in the order of the sheet: the names of 48 of the 768 everyday things with the
/// smallest hashes.
const THINGS: &str = include_str!("sheet.txt");
/// Images in a row.
const COLUMNS: u32 = 8;
/// Pixels of an image on the sheet, along each side, and of the strip with its number.
const CELL: u32 = 256;
const STRIP: u32 = 28;

/// Digits as rows of three bits.
const DIGITS: [[u8; 5]; 10] = [
    [7, 5, 5, 5, 7],
    [2, 6, 2, 2, 7],
    [7, 1, 7, 4, 7],
    [7, 1, 7, 1, 7],
    [5, 5, 7, 1, 1],
    [7, 4, 7, 1, 7],
    [7, 4, 7, 5, 7],
    [7, 1, 1, 1, 1],
    [7, 5, 7, 5, 7],
    [7, 5, 7, 1, 7],
];
/// Pixels of a bit.
const DOT: u32 = 4;

/// The names of the things, in the order of the sheet.
pub fn things() -> impl Iterator<Item = &'static str> {
    THINGS.lines()
}

/// The sheet of images: each enlarged or reduced to one size, below its number, which counts from
/// 1.
pub fn sheet(images: &[RgbImage]) -> RgbImage {
    let rows = (images.len() as u32).div_ceil(COLUMNS);
    let mut sheet = RgbImage::from_pixel(COLUMNS * CELL, rows * (CELL + STRIP), Rgb([230; 3]));
    for (i, image) in images.iter().enumerate() {
        let (x, y) = (i as u32 % COLUMNS * CELL, i as u32 / COLUMNS * (CELL + STRIP));
        number(&mut sheet, (x + 6, y + 4), i + 1);
        let image = imageops::resize(image, CELL, CELL, imageops::FilterType::CatmullRom);
        imageops::replace(&mut sheet, &image, x.into(), (y + STRIP).into());
    }
    sheet
}

fn number(sheet: &mut RgbImage, (x, y): (u32, u32), number: usize) {
    for (i, digit) in number.to_string().bytes().enumerate() {
        let rows = DIGITS[usize::from(digit - b'0')];
        for (row, column) in (0..5).flat_map(|row| (0..3).map(move |column| (row, column))) {
            if rows[row as usize] >> (2 - column) & 1 == 1 {
                let (left, top) = (x + DOT * (4 * i as u32 + column), y + DOT * row);
                (0..DOT * DOT).for_each(|n| sheet.put_pixel(left + n % DOT, top + n / DOT, Rgb([0; 3])));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sheet_has_a_number_over_every_image() {
        assert_eq!(things().count(), 48);
        let images = vec![RgbImage::from_pixel(16, 16, Rgb([10, 200, 30])); 9];
        let sheet = sheet(&images);
        assert_eq!(sheet.dimensions(), (8 * CELL, 2 * (CELL + STRIP)));
        assert_eq!(sheet.get_pixel(100, STRIP + 50), &Rgb([10, 200, 30]));
        // The ninth begins the second row; what would be the tenth is empty.
        assert_eq!(sheet.get_pixel(100, CELL + 2 * STRIP + 50), &Rgb([10, 200, 30]));
        assert_eq!(sheet.get_pixel(CELL + 100, CELL + 2 * STRIP + 50), &Rgb([230; 3]));
        assert!((0..40).any(|x| sheet.get_pixel(x, 10) == &Rgb([0; 3])));
    }
}
