use super::*;
use crate::ops::testing::{agree, random, same};
use candle_core::{Device, Var};

fn inputs(b: usize, t: usize, s: usize, (h, kv, d): (usize, usize, usize)) -> [Var; 3] {
    [random((b, t, h, d), 1), random((b, s, kv, d), 2), random((b, s, kv, d), 3)]
}

/// Causal, with one row that sees nothing and, per batch row, some padding.
fn mask(b: Option<usize>, t: usize, s: usize) -> Result<Tensor> {
    let keep = |b: usize, i: usize, j: usize| i != 1 && j + t <= i + s && (b == 0 || j % 3 != b % 3);
    let bytes = |b| (0..t * s).map(move |n| u8::from(keep(b, n / s, n % s)));
    match b {
        Some(b) => Tensor::from_iter((0..b).flat_map(bytes), &Device::Cpu)?.reshape((b, t, s)),
        None => Tensor::from_iter(bytes(0), &Device::Cpu)?.reshape((t, s)),
    }
}

#[test]
fn matches_the_composition() -> Result<()> {
    for (b, t, s, heads) in [
        (2, 5, 7, (4, 2, 6)),
        (1, 60, 1200, (2, 1, 64)),
        (1, 70, 70, (2, 1, 9)),
        (1, 600, 610, (1, 1, 2)),
        (3, 1, 11, (6, 2, 8)),
        (1, 1, 700, (7, 1, 24)),
        (2, 3, 530, (6, 2, 10)),
    ] {
        let [q, k, v] = &inputs(b, t, s, heads);
        same(&[q, k, v], || attention(q, k, v, Mask::None, 0.4), || composed(q, k, v, None, 0.4));
        let behind = causal_mask(t, s, &Device::Cpu)?;
        same(&[q, k, v], || attention(q, k, v, Mask::Causal, 0.4), || composed(q, k, v, Some(&behind), 0.4));
        for mask in [mask(None, t, s)?, mask(Some(b), t, s)?] {
            same(&[q, k, v], || attention(q, k, v, Mask::Kept(&mask), 0.4), || composed(q, k, v, Some(&mask), 0.4));
        }
    }
    Ok(())
}

#[test]
fn queries_that_see_no_key_give_zeros() -> Result<()> {
    let [q, k, v] = &inputs(2, 4, 5, (2, 1, 3));
    let y = attention(q, k, v, Mask::Kept(&mask(Some(2), 4, 5)?), 1.0)?.narrow(1, 1, 1)?;
    assert!(y.flatten_all()?.to_vec1::<f32>()?.iter().all(|&y| y == 0.0));
    Ok(())
}

#[test]
fn nan_shows_in_the_result() -> Result<()> {
    for (t, s) in [(4, 5), (60, 1200)] {
        let [q, k, v] = inputs(1, t, s, (2, 1, 64));
        let q = (q.as_tensor() * f64::NAN)?;
        for mask in [Mask::None, Mask::Causal, Mask::Kept(&Tensor::ones((t, s), DType::U8, &Device::Cpu)?)] {
            let y = attention(&q, &k, &v, mask, 1.0)?.flatten_all()?.to_vec1::<f32>()?;
            assert!(y.iter().all(|y| y.is_nan()), "{t} queries, {mask:?}");
        }
    }
    Ok(())
}

#[test]
fn reads_views_of_a_cache() {
    let [q, k, v] = &inputs(2, 3, 12, (4, 2, 5));
    let view = |x: &Var| x.narrow(1, 2, 6);
    let kernel = || attention(q, &view(k)?, &view(v)?, Mask::None, 0.5);
    same(&[q, k, v], kernel, || composed(q, &view(k)?, &view(v)?, None, 0.5));
    // Heads that are not contiguous are copied.
    let turned = |x: &Var| x.transpose(1, 2)?.contiguous()?.transpose(1, 2);
    same(&[q, k, v], || attention(q, &turned(k)?, &turned(v)?, Mask::None, 0.5), || composed(q, k, v, None, 0.5));
}

#[test]
fn rows_have_keys_of_their_own() -> Result<()> {
    let q = random((3, 4, 6, 5), 1);
    let rows: Vec<(Tensor, Tensor)> = (0..3)
        .map(|r| {
            (random((1, 4 + 7 * r, 2, 5), 2).as_tensor().clone(), random((1, 4 + 7 * r, 2, 5), 3).as_tensor().clone())
        })
        .collect();
    for mask in [Mask::None, Mask::Causal] {
        let got = attention_rows(&q, &rows, mask, 0.5)?;
        for (r, (k, v)) in rows.iter().enumerate() {
            let want = attention(&q.narrow(0, r, 1)?, k, v, mask, 0.5)?;
            agree(&format!("row {r}, {mask:?}"), &got.narrow(0, r, 1)?, &want)?;
        }
    }
    assert!(attention_rows(&q, &rows[..2], Mask::None, 0.5).is_err());
    Ok(())
}

#[test]
fn other_dtypes_compose() -> Result<()> {
    let [q, k, v] = &inputs(1, 3, 4, (2, 1, 4));
    let half = |x: &Var| x.to_dtype(DType::F64);
    let y = attention(&half(q)?, &half(k)?, &half(v)?, Mask::Causal, 0.5)?;
    assert_eq!(y.dtype(), DType::F64);
    agree("f64", &y.to_dtype(DType::F32)?, &attention(q, k, v, Mask::Causal, 0.5)?)
}

#[test]
fn shapes_that_do_not_fit_are_refused() -> Result<()> {
    let [q, k, v] = &inputs(1, 3, 4, (3, 2, 4));
    assert!(attention(q, k, v, Mask::None, 1.0).is_err());
    let [q, k, v] = &inputs(1, 3, 4, (4, 2, 4));
    assert!(attention(q, k, v, Mask::Kept(&mask(None, 4, 3)?), 1.0).is_err());
    assert!(attention(q, k, &v.narrow(1, 0, 2)?, Mask::None, 1.0).is_err());
    Ok(())
}
