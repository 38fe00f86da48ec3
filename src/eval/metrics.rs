//! How alike images are.

use image::RgbImage;

use crate::pixels::GridResampling;

/// Peak signal-to-noise ratio of two equally large images in dB, over all channels; infinite for
/// equal images.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let square = |(&a, &b): (&u8, &u8)| (f64::from(a) - f64::from(b)).powi(2);
    let error = a.iter().zip(b.iter()).map(square).sum::<f64>() / a.len().max(1) as f64;
    10.0 * (255.0 * 255.0 / error).log10()
}

/// Side and standard deviation of SSIM's Gaussian window.
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;

/// Structural similarity (Wang et al., 2004) of two equally large images: Gaussian windows of 11 x
/// 11 that lie inside the image, per channel, averaged. NaN if no window fits.
pub fn ssim(a: &RgbImage, b: &RgbImage) -> f64 {
    let (width, height) = (a.width() as usize, a.height() as usize);
    let (c1, c2) = ((0.01_f64 * 255.0).powi(2), (0.03_f64 * 255.0).powi(2));
    let (mut sum, mut count) = (0.0, 0);
    for channel in 0..3 {
        let plane = |image: &RgbImage| image.iter().skip(channel).step_by(3).map(|&v| f64::from(v)).collect::<Vec<_>>();
        let (a, b) = (plane(a), plane(b));
        let mean = |f: fn(f64, f64) -> f64| {
            windowed(&a.iter().zip(&b).map(|(&a, &b)| f(a, b)).collect::<Vec<_>>(), width, height)
        };
        let (ma, mb) = (mean(|a, _| a), mean(|_, b| b));
        let (aa, bb, ab) = (mean(|a, _| a * a), mean(|_, b| b * b), mean(|a, b| a * b));
        for i in 0..ma.len() {
            let (va, vb, cov) = (aa[i] - ma[i] * ma[i], bb[i] - mb[i] * mb[i], ab[i] - ma[i] * mb[i]);
            let structure = (2.0 * cov + c2) / (va + vb + c2);
            sum += structure * (2.0 * ma[i] * mb[i] + c1) / (ma[i] * ma[i] + mb[i] * mb[i] + c1);
            count += 1;
        }
    }
    sum / f64::from(count)
}

/// Means under the Gaussian at every place where the window fits.
fn windowed(plane: &[f64], width: usize, height: usize) -> Vec<f64> {
    if width < WINDOW || height < WINDOW {
        return Vec::new();
    }
    let weights = (0..WINDOW).map(|i| (-0.5 * ((i as f64 - (WINDOW / 2) as f64) / SIGMA).powi(2)).exp());
    let weights: Vec<f64> = weights.collect();
    let total: f64 = weights.iter().sum();
    let slide = |at: usize, stride: usize, from: &[f64]| -> f64 {
        weights.iter().enumerate().map(|(i, w)| w / total * from[at + i * stride]).sum()
    };
    let (columns, rows) = (width - WINDOW + 1, height - WINDOW + 1);
    let across: Vec<f64> = (0..height * columns).map(|i| slide(i / columns * width + i % columns, 1, plane)).collect();
    (0..rows * columns).map(|i| slide(i, columns, &across)).collect()
}

/// The entry of `gallery` at the smallest Euclidean distance, which for unit vectors is that of the
/// largest cosine.
pub fn nearest(query: &[f32], gallery: &[Vec<f32>]) -> Option<usize> {
    let distance = |v: &Vec<f32>| v.iter().zip(query).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
    let distances = gallery.iter().map(distance).enumerate();
    distances.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
}

/// Pixel features of an image: means of its areas on a grid of 32 x 32, (32 * 32 * 3), minus their
/// overall mean.
pub fn pixel_feature(image: &RgbImage) -> Vec<f32> {
    let rgb: Vec<f32> = image.iter().map(|&v| f32::from(v) / 255.0).collect();
    let size = (image.height() as usize, image.width() as usize);
    let mut feature = GridResampling::area(size, (32, 32)).apply(&rgb, 3);
    let mean = feature.iter().sum::<f32>() / feature.len() as f32;
    feature.iter_mut().for_each(|v| *v -= mean);
    feature
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(side: u32, v: u8) -> RgbImage {
        RgbImage::from_pixel(side, side, image::Rgb([v; 3]))
    }

    #[test]
    fn psnr_equals_values_by_hand() {
        assert!((psnr(&plain(4, 10), &plain(4, 15)) - 34.151_403).abs() < 1e-5, "20 log10(255 / 5)");
        let mut one = plain(4, 0);
        one.put_pixel(1, 2, image::Rgb([255, 0, 0]));
        assert!((psnr(&plain(4, 0), &one) - 16.812_412).abs() < 1e-5, "10 log10(48)");
        assert_eq!(psnr(&one, &one), f64::INFINITY);
    }

    #[test]
    fn ssim_equals_values_by_hand() {
        // Without structure only the means count: (2 * 100 * 120 + 6.5025) / (100^2 + 120^2 +
        // 6.5025).
        assert!((ssim(&plain(16, 100), &plain(16, 120)) - 0.983_611_0).abs() < 1e-6);
        assert!(ssim(&plain(10, 1), &plain(10, 1)).is_nan());
        // One point of 255 in the middle of a single window: with w the largest weight, m = 255 w,
        // v = 255^2 w (1 - w).
        let mut point = plain(11, 0);
        point.put_pixel(5, 5, image::Rgb([255; 3]));
        assert!((ssim(&point, &point) - 1.0).abs() < 1e-12);
        let total: f64 = (-5..=5).map(|i| (-f64::from(i * i) / 4.5).exp()).sum();
        let w = 1.0 / (total * total);
        let (m, v) = (255.0 * w, 255.0 * 255.0 * w * (1.0 - w));
        let expected = 6.5025 / (m * m + 6.5025) * 58.5225 / (v + 58.5225);
        assert!((ssim(&point, &plain(11, 0)) - expected).abs() < 1e-12);
    }

    #[test]
    fn the_nearest_is_found() {
        let gallery = [vec![1.0, 0.0], vec![0.0, 1.0], vec![0.6, 0.8]];
        assert_eq!(nearest(&[0.1, 0.995], &gallery), Some(1));
        assert_eq!(nearest(&[0.5, 0.866], &gallery), Some(2));
        assert_eq!(nearest(&[1.0], &[]), None);
    }

    #[test]
    fn pixel_features_ignore_brightness_and_keep_place() {
        let mut image = plain(64, 0);
        (0..64).for_each(|y| (32..64).for_each(|x| image.put_pixel(x, y, image::Rgb([255; 3]))));
        let feature = pixel_feature(&image);
        assert_eq!((feature.len(), feature[0], feature[3 * 16]), (3072, -0.5, 0.5));
        assert!(pixel_feature(&plain(64, 77)).iter().all(|v| v.abs() < 1e-5));
    }
}
