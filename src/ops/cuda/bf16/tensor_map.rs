//! Descriptors of tensors for Hopper's bulk copies (TMA).

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, sys};
use candle_core::{Result, bail};

/// `TensorMap` of hopper.cuh, with its alignment in every version of CUDA.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
pub(super) struct TensorMap(sys::CUtensorMap);

const _: () = assert!(size_of::<TensorMap>() == 128);

// SAFETY: the driver makes it to be passed to kernels by value.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Of a contiguous bf16 tensor at an address, innermost dimension first, for copies of boxes of
    /// these sizes into shared memory, swizzled in rows of 128 bytes. What is outside of the tensor
    /// becomes zeros.
    ///
    /// Errors: a tensor or boxes that the hardware does not support.
    pub(super) fn new<const N: usize>(address: u64, dims: [usize; N], sizes: [u32; N]) -> Result<Self> {
        let dims = dims.map(|d| d as u64);
        let mut strides = [2; N];
        for i in 1..N {
            strides[i] = strides[i - 1] * dims[i - 1];
        }
        if sizes[0] != 64 || dims.contains(&0) || strides[1..].iter().any(|stride| stride % 16 != 0) {
            bail!("no boxes of {sizes:?} in {dims:?}");
        }
        let (steps, mut map) = ([1; N], std::mem::MaybeUninit::uninit());
        // SAFETY: the arrays are as long as the rank N, and the map is read only if the driver has
        // made it.
        #[allow(unsafe_code)]
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                N as u32,
                address as *mut _,
                dims.as_ptr(),
                strides[1..].as_ptr(),
                sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .w()?;
            Ok(Self(map.assume_init()))
        }
    }
}
