use super::super::testing::{random, same};
use super::*;

#[test]
fn matches_the_composition() {
    let x = random((3, 5, 9, 7), 1);
    for (k, stride, padding) in [(3, 1, [1; 4]), (3, 2, [0, 1, 0, 1]), (1, 1, [0; 4]), (1, 2, [0; 4])] {
        let (w, b) = (random((4, 5, k, k), 2), random(4, 3));
        let kernel = || conv2d(&x, &w, Some(&b), stride, padding);
        same(&[&x, &w, &b], kernel, || composed(&x, &w, Some(&b), stride, padding));
        same(&[&x, &w], || conv2d(&x, &w, None, stride, padding), || composed(&x, &w, None, stride, padding));
    }
}

#[test]
fn direct_convolution_matches_the_composition() {
    for (shape, o, k, padding) in [
        ((2, 5, 9, 7), 8, 3, [1; 4]),
        ((1, 32, 16, 16), 24, 3, [1; 4]),
        ((1, 3, 8, 8), 16, 1, [0; 4]),
        ((2, 4, 3, 11), 8, 3, [2, 0, 1, 1]),
        ((1, 2, 3, 3), 8, 3, [0; 4]),
        ((1, 3, 5, 130), 11, 3, [1; 4]),
        ((1, 2, 40, 9), 3, 5, [2; 4]),
    ] {
        let (x, w, b) = (random(shape, 1), random((o, shape.1, k, k), 2), random(o, 3));
        let kernel = || conv2d(&x, &w, Some(&b), 1, padding);
        same(&[&x, &w, &b], kernel, || composed(&x, &w, Some(&b), 1, padding));
    }
}

#[test]
fn one_large_image_goes_in_bands() {
    let (x, w) = (random((1, 64, 40, 64), 1), random((3, 64, 3, 3), 2));
    for (stride, padding) in [(1, [1; 4]), (1, [3, 0, 0, 4]), (2, [0, 1, 0, 1])] {
        same(&[&x, &w], || conv2d(&x, &w, None, stride, padding), || composed(&x, &w, None, stride, padding));
    }
}

#[test]
fn strips_are_the_whole() {
    let (x, w) = (random((2, 5, 23, 9), 1), random((4, 5, 3, 3), 2));
    for (stride, rows) in [(1, 1), (1, 6), (2, 4), (2, 100)] {
        same(&[&x, &w], || in_strips(&x, &w, stride, rows), || x.conv2d(&w, 0, stride, 1, 1));
    }
}

#[test]
fn residuals_and_upsampling_match_the_composition() {
    let (x, base) = (random((2, 3, 6, 5), 1), random((2, 4, 6, 5), 4));
    for k in [1, 3] {
        let (w, b) = (random((4, 3, k, k), 2), random(4, 3));
        let conv = |x: &Tensor| conv2d(x, &w, Some(&b), 1, [k / 2; 4]);
        same(&[&base, &x, &w, &b], || add_conv2d(&base, &x, &w, &b), || base.as_tensor() + conv(&x)?);
        // Twice each row, then each column.
        let twice = |x: &Tensor, dim| Tensor::stack(&[x, x], dim + 1)?.flatten(dim, dim + 1);
        let repeated = || twice(&twice(&x, 2)?, 3);
        same(&[&x, &w, &b], || upsampled_conv2d(&x, &w, &b), || conv(&repeated()?));
        let fixed = x.as_detached_tensor();
        same(&[&w, &b], || upsampled_conv2d(&fixed, &w, &b), || conv(&repeated()?));
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let (x, w) = (random((1, 2, 2, 2), 1), random((3, 2, 3, 3), 2));
    assert!(conv2d(&x, &w, None, 1, [0; 4]).is_err());
    assert!(conv2d(&x, &w, None, 0, [1; 4]).is_err());
    assert!(conv2d(&x, &random((3, 1, 1, 1), 2), None, 1, [0; 4]).is_err());
}
