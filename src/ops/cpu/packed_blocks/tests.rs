use super::*;
use crate::ops::cpu::quants::quantize;
use crate::ops::testing::random_values as values;

const TYPES: [GgmlDType; 3] = [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K];

fn blocks(shape: (usize, usize), dtype: GgmlDType, seed: u64) -> Vec<u8> {
    quantize(&values(shape, seed), shape, dtype, &Device::Cpu).unwrap().data().unwrap().into_owned()
}

fn matrix(shape: (usize, usize), dtype: GgmlDType, seed: u64) -> PackedBlocks {
    PackedBlocks::new(&blocks(shape, dtype, seed), dtype, shape).unwrap()
}

fn numbers(w: &PackedBlocks) -> Vec<f32> {
    let mut out = vec![0.0; w.rows * w.columns];
    dequantize(&w.select(0..w.rows).unwrap(), w.dtype, &mut out).unwrap();
    out
}

/// The products in f64, and the largest error that rounding the inputs and adding in f32 explain.
fn exact(x: &[f32], w: &PackedBlocks) -> Vec<(f64, f64)> {
    let numbers = numbers(w);
    let mut out = Vec::new();
    for x in x.chunks_exact(w.columns) {
        for w in numbers.chunks_exact(w.columns) {
            let (mut sum, mut rounding, mut size) = (0.0, 0.0, 0.0);
            for (x, w) in x.chunks_exact(GROUP).zip(w.chunks_exact(GROUP)) {
                let largest = |x: &[f32]| f64::from(x.iter().fold(0f32, |most, x| most.max(x.abs())));
                let step = largest(x) / 32767.0;
                for (x, w) in x.iter().zip(w) {
                    sum += f64::from(*x) * f64::from(*w);
                    rounding += 0.5 * step * f64::from(w.abs());
                }
                // Offsets of Q4_K are summed apart from what they are subtracted from.
                size += 3.0 * largest(w) * x.iter().map(|x| f64::from(x.abs())).sum::<f64>();
            }
            let additions = (w.len() / GROUP + 4) as f64;
            out.push((sum, 1.001 * rounding + additions * size * f64::from(f32::EPSILON) / 2.0));
        }
    }
    out
}

#[test]
fn products_lose_no_more_than_rounding() -> Result<()> {
    for dtype in TYPES {
        for (inputs, rows, columns) in
            [(1, 1, 256), (2, 33, 512), (5, 16, 1280), (6, 64, 768), (7, 130, 256), (13, 100, 512), (64, 70, 256)]
        {
            let (x, bias) = (values((inputs, columns), 1), values((1, rows), 3));
            let (w, up) = (matrix((rows, columns), dtype, 2), matrix((rows, columns), dtype, 4));
            let (gates, ups) = (exact(&x, &w), exact(&x, &up));
            for kernel in Kernel::all() {
                let inputs = Inputs::round(&x, columns, kernel);
                let biased = product(&inputs, &w, None, Some(&bias))?;
                for (i, got) in biased.iter().enumerate() {
                    let (want, most) = (gates[i].0 + f64::from(bias[i % rows]), gates[i].1 + 1e-6);
                    let off = (f64::from(*got) - want).abs();
                    assert!(off <= most, "{dtype:?} {kernel:?} {rows}x{columns}: {got} is off by {off}, not {most}");
                }
                let silu = |x: f64| x / (1.0 + (-x).exp());
                for (i, got) in product(&inputs, &w, Some(&up), None)?.iter().enumerate() {
                    let ((gate, off), (up, up_off)) = (gates[i], ups[i]);
                    let most = 1.1 * off * (up.abs() + up_off) + silu(gate).abs() * (up_off + 1e-6 * up.abs()) + 1e-5;
                    assert!((f64::from(*got) - silu(gate) * up).abs() <= most, "{dtype:?} {kernel:?} gated");
                }
            }
        }
    }
    Ok(())
}

/// One channel that is a thousand times as large as the others, as in real models, costs the others
/// nothing but in its own group.
#[test]
fn a_large_input_leaves_other_groups_exact() -> Result<()> {
    let (mut x, w) = (values((1, 512), 1), matrix((32, 512), GgmlDType::Q8_0, 2));
    let want = matmul_each(&x, &[(&w, None)], 512)?.remove(0);
    x[3] = 1e4;
    let numbers = numbers(&w);
    let without = |y: &[f32], first: f32| -> Vec<f64> {
        let w = numbers.chunks_exact(512);
        y.iter().zip(w).map(|(y, w)| f64::from(*y) - f64::from(w[3]) * f64::from(first)).collect()
    };
    let got = without(&matmul_each(&x, &[(&w, None)], 512)?[0], 1e4);
    let want = without(&want, values((1, 512), 1)[3]);
    // Half a step of 1e4 / 32767, in the 31 others of its group, and what f32 loses beside 1e4.
    let most = 0.16 * 31.0 * 0.7 + 1e-2;
    assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < most), "{got:?} {want:?}");
    Ok(())
}

/// Beside any other rows, and with registers of any width.
#[test]
fn a_row_always_gives_the_same_bits() -> Result<()> {
    for dtype in TYPES {
        let (x, w) = (values((29, 512), 1), matrix((70, 512), dtype, 2));
        let mut all = Vec::new();
        for kernel in Kernel::all() {
            let product = |x: &[f32], w: &PackedBlocks| product(&Inputs::round(x, 512, kernel), w, None, None);
            let together = product(&x, &w)?;
            for (x, want) in x.chunks_exact(512).zip(together.chunks_exact(70)) {
                assert_eq!(product(x, &w)?, want);
            }
            let part = w.narrow(3, 60)?.narrow(30, 30)?;
            let of_part = product(&x, &part)?;
            assert!(of_part.chunks_exact(30).zip(together.chunks_exact(70)).all(|(part, all)| part == &all[33..63]));
            all.push(together);
        }
        assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{dtype:?}");
    }
    Ok(())
}

#[test]
fn blocks_come_back_as_they_were() -> Result<()> {
    for dtype in TYPES {
        let (shape, row) = ((37, 768), size_in_bytes(dtype, 768));
        let bytes = blocks(shape, dtype, 2);
        let w = PackedBlocks::new(&bytes, dtype, shape)?;
        assert_eq!(w.to_qtensor()?.data()?, bytes, "{dtype:?}");
        assert_eq!(w.narrow(5, 20)?.to_qtensor()?.data()?, &bytes[5 * row..25 * row]);
        let order = w.reordered(&[36, 0, 0])?.to_qtensor()?;
        assert_eq!(order.data()?, [&bytes[36 * row..], &bytes[..row], &bytes[..row]].concat());
        let (start, count) = (256, 512);
        let part = w.columns(start, count)?.expect("whole blocks").to_qtensor()?;
        let range = size_in_bytes(dtype, start)..size_in_bytes(dtype, start + count);
        let want: Vec<u8> = bytes.chunks_exact(row).flat_map(|row| &row[range.clone()]).copied().collect();
        assert_eq!(part.data()?, want, "{dtype:?}");
        assert!(w.columns(8, 256)?.is_none() && w.columns(700, 69).is_err());
    }
    Ok(())
}

#[test]
fn non_finite_rows_give_nan_and_zeros_are_exact() -> Result<()> {
    for dtype in TYPES {
        let w = matrix((20, 256), dtype, 2);
        let mut x = values((3, 256), 1);
        (x[7], x[256 + 45]) = (f32::NAN, f32::NEG_INFINITY);
        x[512..].fill(0.0);
        let y = matmul_each(&x, &[(&w, None)], 256)?.remove(0);
        assert!(y[..40].iter().all(|y| y.is_nan()) && y[40..].iter().all(|y| *y == 0.0), "{dtype:?}");
    }
    Ok(())
}

/// The largest numbers in every place.
#[test]
fn no_sum_overflows() -> Result<()> {
    let one = 0x3c00u16.to_le_bytes();
    // Blocks of Q8_0 of -128, of Q4_0 of -8, and of Q4_K of 15 times 63.
    let q8_0 = [&one[..], &[0x80; 32]].concat();
    let q4_0 = [&one[..], &[0; 16]].concat();
    let q4_k = [&one[..], &[0; 2], &[0x3f | 0xc0; 4], &[0; 4], &[0x0f; 4], &[0xff; 128]].concat();
    for (dtype, block, number) in
        [(GgmlDType::Q8_0, q8_0, -128.0), (GgmlDType::Q4_0, q4_0, -8.0), (GgmlDType::Q4K, q4_k, 15.0 * 63.0)]
    {
        let w = PackedBlocks::new(&block, dtype, (1, dtype.block_size()))?;
        let columns = w.columns;
        for kernel in Kernel::all() {
            for x in [1.0, -1.0] {
                let y = product(&Inputs::round(&vec![x; 7 * columns], columns, kernel), &w, None, None)?;
                assert!(y.iter().all(|y| (y / (number * x * columns as f32) - 1.0).abs() < 1e-6), "{dtype:?}: {y:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() {
    assert!(!PackedBlocks::supports(GgmlDType::Q8_0, 40) && !PackedBlocks::supports(GgmlDType::Q4K, 128));
    assert!(!PackedBlocks::supports(GgmlDType::Q8_0, 0) && !PackedBlocks::supports(GgmlDType::BF16, 256));
    assert!(PackedBlocks::new(&[0; 33], GgmlDType::Q8_0, (1, 32)).is_err());
    assert!(PackedBlocks::new(&[0; 34], GgmlDType::Q8_0, (1, 33)).is_err());
    let w = matrix((2, 32), GgmlDType::Q8_0, 1);
    assert!(w.narrow(1, 2).is_err() && w.narrow(usize::MAX, 2).is_err() && w.reordered(&[2]).is_err());
}
