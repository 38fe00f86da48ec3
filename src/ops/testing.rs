//! Shared by the tests of operations: random operands, and comparison with a reference.

use candle_core::{Device, Result, Shape, Tensor, Var};

use crate::rng::{Rng, Stream};

/// A trainable tensor of standard normals.
pub(crate) fn random(shape: impl Into<Shape>, seed: u64) -> Var {
    let shape = shape.into();
    let rng = Rng::new(seed, 0, Stream::Train, 0);
    let values: Vec<f32> = (0..shape.elem_count() as u64).map(|i| rng.normal(i) as f32).collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).expect("random values")).expect("a variable")
}

/// The values of [`random`].
pub(crate) fn random_values(shape: (usize, usize), seed: u64) -> Vec<f32> {
    random(shape, seed).flatten_all().expect("one dimension").to_vec1().expect("f32")
}

/// Fails unless the largest difference is below 1e-4 of the largest value.
pub(crate) fn agree(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}: shape");
    let largest = |t: &Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let (error, scale) = (largest(&(got - want)?)?, largest(want)?);
    assert!(error <= 1e-4 * scale.max(1e-3), "{what}: off by {error} of {scale}");
    Ok(())
}

/// The largest difference of two tensors of one shape.
pub(crate) fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims(), "shape");
    let largest = || (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    largest().expect("tensors of f32")
}

/// Compares an operation with a reference: the value, and the gradient of every input.
pub(crate) fn same(inputs: &[&Var], op: impl Fn() -> Result<Tensor>, reference: impl Fn() -> Result<Tensor>) {
    let run = || -> Result<()> {
        let (got, want) = (op()?, reference()?);
        agree("value", &got, &want)?;
        let weights = random(want.shape().clone(), 99);
        let (got, want) = ((got * weights.as_tensor())?.sum_all()?, (want * weights.as_tensor())?.sum_all()?);
        let (got, want) = (got.backward()?, want.backward()?);
        for (i, input) in inputs.iter().enumerate() {
            let (got, want) = (got.get(input), want.get(input));
            agree(&format!("gradient {i}"), got.expect("a gradient"), want.expect("a gradient"))?;
        }
        Ok(())
    };
    run().expect("operation and reference run");
}
