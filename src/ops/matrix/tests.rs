use candle_core::quantized::GgmlDType;

use super::*;
use crate::ops::cpu::gemv::GEMV_ROWS;
use crate::ops::cpu::quants::quantize;
use crate::ops::swiglu;
use crate::ops::testing::{distance, random};

#[test]
fn blocks_multiply_as_their_numbers() -> Result<()> {
    let (w, b) = (random((300, 256), 1), random(300, 2));
    let values = w.flatten_all()?.to_vec1::<f32>()?;
    for dtype in [GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K] {
        let blocks = quantize(&values, (300, 256), dtype, &Device::Cpu)?;
        let dense = WeightMatrix::Dense(blocks.dequantize(&Device::Cpu)?);
        let blocks = WeightMatrix::from(blocks);
        for inputs in [1, 4, 60] {
            let x = random((2, inputs, 256), 3);
            // Where both factors may be rounded to bf16, a product is off by 2^-8 of itself at
            // most; inputs rounded to 16 bits are off by 2^-16 of the largest.
            let part = match dtype {
                _ if inputs > GEMV_ROWS => 1.01 / 256.0,
                GgmlDType::F16 => 0.0,
                GgmlDType::BF16 => {
                    if inputs > 1 {
                        1.01 / 256.0
                    } else {
                        0.0
                    }
                }
                _ => 2e-4,
            };
            let check = |blocks: &WeightMatrix, dense: &WeightMatrix, bias: Option<&Tensor>| {
                let WeightMatrix::Dense(w) = dense else { unreachable!("it is dense") };
                let most = ((linear(&x.abs()?, &w.abs()?, None)? * part)? + 1e-4)?;
                let off = (blocks.linear(&x, bias)? - dense.linear(&x, bias)?)?.abs()?;
                let over = distance(&off.maximum(&most)?, &most);
                assert!(over == 0.0, "{dtype:?}, {inputs} inputs: {over} over what rounding explains");
                Result::Ok(())
            };
            check(&blocks, &dense, Some(&b))?;
            let part = |m: &WeightMatrix| m.narrow(7, 100)?.narrow(1, 70);
            check(&part(&blocks)?, &part(&dense)?, None)?;
        }
        let ids = Tensor::new(&[0u32, 299, 5], &Device::Cpu)?;
        assert_eq!(distance(&blocks.select(&ids)?, &dense.select(&ids)?), 0.0);
        let (order, all) = ([299u32, 7, 7], Tensor::new(&[0u32, 1, 2], &Device::Cpu)?);
        for whole in [&blocks, &blocks.narrow(0, 300)?, &dense] {
            let want = dense.select(&Tensor::new(&order, &Device::Cpu)?)?;
            assert_eq!(distance(&whole.reordered(&order)?.select(&all)?, &want), 0.0);
        }
        assert!(blocks.narrow(0, 10)?.reordered(&[10]).is_err());
    }
    Ok(())
}

/// All factors are bf16 already: sizes that fill no panel, tile or register lose nothing but
/// the rounding of sums.
#[test]
fn any_size_loses_no_more_than_rounding() -> Result<()> {
    for (inputs, rows, columns) in [(9, 8, 32), (60, 75, 1088), (1000, 33, 96), (33, 18, 5632)] {
        let round = |x: &Tensor| x.to_dtype(DType::BF16)?.to_dtype(DType::F32);
        let (x, w, b) = (round(&random((inputs, columns), 1))?, round(&random((rows, columns), 2))?, random(rows, 3));
        let values = w.flatten_all()?.to_vec1::<f32>()?;
        let blocks = WeightMatrix::from(quantize(&values, (rows, columns), GgmlDType::BF16, &Device::Cpu)?);
        let want = WeightMatrix::Dense(w).linear(&x, Some(&b))?;
        assert!(distance(&blocks.linear(&x, Some(&b))?, &want) < 1e-3, "{inputs} x {rows} x {columns}");
    }
    Ok(())
}

#[test]
fn gated_products_are_those_of_the_composition() -> Result<()> {
    for (inputs, rows, columns) in [(3, 40, 256), (70, 270, 256), (20, 12, 5632)] {
        let (x, w) = (random((2, inputs, columns), 1), random((2 * rows, columns), 2));
        let values = (w.as_tensor() / (columns as f64).sqrt())?.flatten_all()?.to_vec1::<f32>()?;
        for dtype in [GgmlDType::F32, GgmlDType::BF16, GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K] {
            let matrix = |values| quantize(values, (rows, columns), dtype, &Device::Cpu).map(WeightMatrix::from);
            let (gate, up) = (matrix(&values[..rows * columns])?, matrix(&values[rows * columns..])?);
            let want = swiglu(&gate.linear(&x, None)?, &up.linear(&x, None)?)?;
            assert!(distance(&gated_linear(&x, &gate, &up)?, &want) < 1e-4, "{dtype:?}, {inputs} x {rows} x {columns}");
        }
    }
    Ok(())
}

#[test]
fn int8_weights_multiply_as_their_numbers() -> Result<()> {
    if !Int8Matrix::supports(64) {
        return Ok(());
    }
    let matrix = |rows: usize, by: usize| -> Result<(WeightMatrix, WeightMatrix)> {
        let bytes: Vec<u8> = (0..rows * 64).map(|i| (i * by % 256) as u8).collect();
        let scales: Vec<f32> = (0..rows).map(|row| 0.001 * (row + 1) as f32).collect();
        let bytes = Int8Matrix::new(bytes.into(), &scales, (rows, 64))?;
        let mut numbers = Vec::new();
        (0..rows).try_for_each(|row| bytes.dequantize_row(row, &mut numbers))?;
        let dense = Tensor::from_vec(numbers, (rows, 64), &Device::Cpu)?;
        Ok((WeightMatrix::Int8(bytes), WeightMatrix::Dense(dense)))
    };
    let ((a, a_dense), (b, b_dense), (wide, _)) = (matrix(40, 37)?, matrix(40, 91)?, matrix(41, 11)?);
    let (x, bias) = (random((2, 7, 64), 1), random(40, 2));
    let near = |got: &Tensor, want: &Tensor| {
        let (off, largest) = (distance(got, want), distance(want, &want.zeros_like().unwrap()));
        assert!(off < 1e-4 * largest, "{off} of {largest}");
    };
    let want = linear_each(&x, [(&a_dense, None), (&b_dense, Some(&bias))])?;
    for layers in [[(&a, None), (&b, Some(&*bias))], [(&a_dense, None), (&b, Some(&*bias))]] {
        linear_each(&x, layers)?.iter().zip(&want).for_each(|(got, want)| near(got, want));
    }
    near(&gated_linear(&x, &a, &b)?, &gated_linear(&x, &a_dense, &b_dense)?);
    assert!(gated_linear(&x, &a, &wide).is_err() && a.linear(&random((2, 63), 1), None).is_err());
    let ids = Tensor::new(&[39u32, 0, 39], &Device::Cpu)?;
    assert_eq!(distance(&a.narrow(0, 40)?.select(&ids)?, &a_dense.select(&ids)?), 0.0);
    assert!(a.select(&Tensor::new(&[40u32], &Device::Cpu)?).is_err());
    Ok(())
}

#[test]
fn rows_that_do_not_exist_are_refused() -> Result<()> {
    let values = random((4, 32), 1).flatten_all()?.to_vec1::<f32>()?;
    let w = WeightMatrix::from(quantize(&values, (4, 32), GgmlDType::Q8_0, &Device::Cpu)?);
    assert!(w.narrow(2, 3).is_err() && w.narrow(usize::MAX, 2).is_err());
    assert!(w.select(&Tensor::new(&[4u32], &Device::Cpu)?).is_err());
    assert!(w.linear(&random((2, 31), 2), None).is_err());
    Ok(())
}

/// Blocks that begin and end with the columns are kept, others become f32; the numbers are the
/// same.
#[test]
fn columns_are_a_matrix_of_their_own() -> Result<()> {
    let values = random((6, 128), 1);
    let flat = values.flatten_all()?.to_vec1::<f32>()?;
    let ids = Tensor::arange(0u32, 6, &Device::Cpu)?;
    let blocks = WeightMatrix::from(quantize(&flat, (6, 128), GgmlDType::Q8_0, &Device::Cpu)?);
    let half = WeightMatrix::from(quantize(&flat, (6, 128), GgmlDType::BF16, &Device::Cpu)?);
    for w in [WeightMatrix::Dense(values.as_detached_tensor()), blocks, half] {
        let all = w.select(&ids)?;
        for (start, count) in [(0, 32), (64, 64), (20, 40), (0, 128)] {
            let part = w.columns(start, count)?;
            assert_eq!(distance(&part.select(&ids)?, &all.narrow(1, start, count)?), 0.0, "{start} {count}");
            let x = random((3, count), 2);
            assert!(distance(&part.linear(&x, None)?, &x.matmul(&all.narrow(1, start, count)?.t()?)?) < 0.1);
        }
        let rows = w.narrow(2, 3)?.columns(32, 32)?;
        assert_eq!(distance(&rows.select(&ids.narrow(0, 0, 3)?)?, &all.narrow(0, 2, 3)?.narrow(1, 32, 32)?), 0.0);
        assert!(w.columns(100, 29).is_err() && w.columns(usize::MAX, 2).is_err());
    }
    Ok(())
}
