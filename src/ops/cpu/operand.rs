//! Operands of the kernels, borrowed from tensors.

use candle_core::{CpuStorage, DType, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType, bail};

/// Elements on the CPU and how they lie in memory.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    storage: &'a CpuStorage,
    layout: &'a Layout,
}

impl<'a> Operand<'a> {
    pub(crate) fn new(storage: &'a CpuStorage, layout: &'a Layout) -> Self {
        Self { storage, layout }
    }

    pub(crate) fn layout(&self) -> &'a Layout {
        self.layout
    }

    pub(crate) fn shape(&self) -> &'a Shape {
        self.layout.shape()
    }

    pub(crate) fn dims(&self) -> &'a [usize] {
        self.layout.dims()
    }

    /// All elements.
    ///
    /// Errors: an operand that is not contiguous or has another dtype.
    pub(crate) fn slice<T: WithDType>(&self) -> Result<&'a [T]> {
        match self.layout.contiguous_offsets() {
            Some((start, end)) => Ok(&self.storage.as_slice::<T>()?[start..end]),
            None => bail!("a kernel needs a contiguous operand, got strides {:?}", self.layout.stride()),
        }
    }

    /// The storage from the first element on, for an operand with any strides.
    ///
    /// Errors: another dtype.
    pub(crate) fn strided(&self) -> Result<&'a [f32]> {
        Ok(&self.storage.as_slice::<f32>()?[self.layout.start_offset()..])
    }
}

/// Keeps a tensor's storage locked for reading while its elements are in use.
pub(crate) struct Borrowed<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    /// Errors: a tensor on another device.
    pub(crate) fn operand(&self) -> Result<Operand<'_>> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(Operand::new(storage, self.layout)),
            _ => bail!("a CPU kernel got a tensor of another device"),
        }
    }

    /// As [`Operand::slice`].
    pub(crate) fn slice<T: WithDType>(&self) -> Result<&[T]> {
        self.operand()?.slice()
    }
}

/// Whether all are f32 on the CPU and none is empty.
pub(crate) fn are_f32(tensors: &[&Tensor]) -> bool {
    tensors.iter().all(|t| t.device().is_cpu() && t.dtype() == DType::F32 && t.elem_count() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn borrowing_checks_dtype_and_strides() -> Result<()> {
        let x = Tensor::arange(0f32, 6.0, &candle_core::Device::Cpu)?.reshape((2, 3))?;
        assert_eq!(Borrowed::of(&x.narrow(0, 1, 1)?).slice::<f32>()?, [3., 4., 5.]);
        assert!(Borrowed::of(&x).slice::<u8>().is_err());
        assert!(Borrowed::of(&x.t()?).slice::<f32>().is_err());
        Ok(())
    }
}
