//! Attention of the rows of a batch, and the split of a joint projection into heads.

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute as Attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{Result, Storage, Tensor, bail};
use half::bf16;

use super::elementwise::ELEMENTWISE;
use super::tensor_map::TensorMap;
use super::{THREADS, address, aligned, blocks, device, hopper, is_bf16, kernel, launch, operand, uninit};

const ATTENTION: (&str, &str) = ("attention", include_str!(concat!(env!("OUT_DIR"), "/attention.ptx")));
const HOPPER: (&str, &str) = ("attention_hopper", include_str!(concat!(env!("OUT_DIR"), "/attention_hopper.ptx")));

/// Head sizes that [`attention`] is compiled for.
pub(crate) const HEAD_DIMS: [usize; 3] = [32, 64, 128];

/// The most batch rows of a launch.
const MAX_ROWS: usize = 16;
/// The same of the kernel for Hopper.
const MAX_HOPPER_ROWS: usize = 8;

/// `Rows` of rows.cuh.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Rows {
    k: [u64; MAX_ROWS],
    v: [u64; MAX_ROWS],
    length: [i32; MAX_ROWS],
}

/// `Rows` of attention_hopper.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct HopperRows {
    k: [TensorMap; MAX_HOPPER_ROWS],
    v: [TensorMap; MAX_HOPPER_ROWS],
    length: [i32; MAX_HOPPER_ROWS],
}

// SAFETY: numbers alone, laid out as in CUDA.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for Rows {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl DeviceRepr for HopperRows {}

impl Rows {
    /// Keys and values (1, capacity, KV, D) of every row, contiguous, and how many positions are in
    /// use.
    fn of<'a>(rows: impl Iterator<Item = (&'a Tensor, &'a Tensor, usize)>) -> Result<Self> {
        let mut all = Self::default();
        for (i, (k, v, length)) in rows.enumerate() {
            (all.k[i], all.v[i], all.length[i]) = (start(k)?, start(v)?, length as i32);
        }
        Ok(all)
    }
}

impl HopperRows {
    /// Keys and values (1, S, KV, D) of every row, contiguous.
    fn of(rows: &[(Tensor, Tensor)]) -> Result<Self> {
        let boxes = |x: &Tensor| {
            let (_, s, kv, d) = x.dims4()?;
            TensorMap::new(start(x)?, [d, kv, s], [64, 1, 128])
        };
        let Some((k, v)) = rows.first() else { bail!("no rows") };
        // The kernel does not read those of missing rows.
        let (k, v) = (boxes(k)?, boxes(v)?);
        let mut all = Self { k: [k; MAX_HOPPER_ROWS], v: [v; MAX_HOPPER_ROWS], length: [0; MAX_HOPPER_ROWS] };
        for (i, (k, v)) in rows.iter().enumerate() {
            (all.k[i], all.v[i], all.length[i]) = (boxes(k)?, boxes(v)?, k.dim(1)? as i32);
        }
        Ok(all)
    }
}

/// The address of keys or values.
fn start(x: &Tensor) -> Result<u64> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("keys and values are not on a GPU") };
    Ok(address(&storage.as_cuda_slice::<bf16>()?.slice(layout.start_offset()..)))
}

fn tensor(numbers: CudaSlice<bf16>, device: &CudaDevice, shape: (usize, usize, usize, usize)) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(numbers, device.clone()));
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// [`attention_rows`](crate::ops::attention_rows) without a mask or with the causal one: q
/// (R, T, H, D) over contiguous keys and values of its own for every row, (1, S, KV, D).
pub(crate) fn attention(q: &Tensor, rows: &[(Tensor, Tensor)], causal: bool, scale: f32) -> Result<Tensor> {
    let ((r, t, heads, d), Some(device)) = (q.dims4()?, device(&[q])) else { bail!("queries are not on a GPU") };
    let (_, _, kv, _) = rows[0].0.dims4()?;
    let queries = t * (heads / kv);
    let hopper = hopper(&device) && d == 128;
    // Queries and threads per block, and bytes of shared memory: the queries, two tiles of keys and
    // two of values, and on Hopper their barriers.
    let (module, name, tile, threads, barriers) = match hopper {
        true => (HOPPER, "attention_hopper_d128".to_string(), 128, 384, 64),
        false => (ATTENTION, format!("attention_bf16_d{d}"), 64, 128, 0),
    };
    let shared = 5 * tile * d * 2 + barriers;
    let function = kernel!(device, module, &name);
    function.set_attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared as i32).w()?;
    let q = q.contiguous()?;
    let (storage, layout) = q.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("queries are not on a GPU") };
    let q = operand::<bf16>(storage, layout)?;
    let mut out = uninit::<bf16>(&device, r * t * heads * d)?;
    let (tokens, heads_of, kv_of, causal) = (t as i32, heads as i32, kv as i32, i32::from(causal));
    let max_rows = if hopper { MAX_HOPPER_ROWS } else { MAX_ROWS };
    for (i, rows) in rows.chunks(max_rows).enumerate() {
        let part = i * max_rows * t * heads * d..;
        let (q, mut out) = (q.slice(part.clone()), out.slice_mut(part));
        let blocks = blocks((queries.div_ceil(tile), kv, rows.len()), threads, shared);
        if hopper {
            let batch = HopperRows::of(rows)?;
            launch!(&function, blocks, &q, &batch, &mut out, &tokens, &heads_of, &kv_of, &scale, &causal);
        } else {
            let batch = Rows::of(rows.iter().map(|(k, v)| (k, v, k.dims()[1])))?;
            launch!(&function, blocks, &q, &batch, &mut out, &tokens, &heads_of, &kv_of, &scale, &causal);
        }
    }
    Ok(tensor(out, &device, (r, t, heads, d)))
}

/// See [`project_heads`](crate::ops::project_heads); cos and sin are (R, T, D / 2). None for
/// operands that are not supported.
pub(crate) fn project_heads(
    x: &Tensor,
    bias: Option<&Tensor>,
    (cos, sin): (&Tensor, &Tensor),
    caches: &[(&Tensor, &Tensor, usize)],
) -> Result<Option<Tensor>> {
    let ((r, t, all), Some(device)) = (x.dims3()?, device(&[x, bias.unwrap_or(x)])) else { return Ok(None) };
    let Some((first, ..)) = caches.first() else { return Ok(None) };
    let (_, _, kv, d) = first.dims4()?;
    let heads = (all / d.max(1)).saturating_sub(2 * kv);
    let angles = |a: &Tensor| a.dims() == [r, t, d / 2] && a.is_contiguous() && aligned(a);
    if !x.is_contiguous() || d % 8 != 0 || !angles(cos) || !angles(sin) {
        return Ok(None);
    }
    if caches.len() != r || (heads + 2 * kv) * d != all || bias.is_some_and(|bias| bias.dims() != [all]) {
        let bias = bias.map(Tensor::dims);
        bail!("heads: {:?} does not fit a bias {bias:?} and {} caches of {:?}", x.dims(), caches.len(), first.dims());
    }
    for (keys, values, start) in caches {
        let capacity = keys.dim(1)?;
        let fit = keys.dims() == [1, capacity, kv, d] && values.dims() == keys.dims();
        if !fit || ![*keys, *values].iter().all(|t| is_bf16(t, x.device()) && aligned(t) && t.is_contiguous()) {
            bail!("heads: keys {:?} and values {:?} are no cache of {kv} heads of {d}", keys.dims(), values.dims());
        }
        if start + t > capacity {
            bail!("a sequence of {} does not fit a cache of {capacity}", start + t);
        }
    }
    let borrowed = [x, cos, sin, bias.unwrap_or(x)].map(|t| t.storage_and_layout());
    let [Storage::Cuda(x), Storage::Cuda(cos), Storage::Cuda(sin), Storage::Cuda(more)] =
        borrowed.each_ref().map(|(s, _)| &**s)
    else {
        return Ok(None);
    };
    let layouts = borrowed.each_ref().map(|(_, l)| *l);
    let (x, more) = (operand::<bf16>(x, layouts[0])?, operand::<bf16>(more, layouts[3])?);
    let (cos, sin) = (operand::<f32>(cos, layouts[1])?, operand::<f32>(sin, layouts[2])?);
    let mut out = uninit::<bf16>(&device, r * t * heads * d)?;
    let function = kernel!(device, ELEMENTWISE, "heads_bf16");
    let (heads_of, kv_of, head_dim) = (heads as i32, kv as i32, d as i32);
    // A null pointer is none.
    let bias = if bias.is_some() { address(&more) } else { 0 };
    for (i, rows) in caches.chunks(MAX_ROWS).enumerate() {
        let first = i * MAX_ROWS * t;
        let (x, mut out) = (x.slice(first * all..), out.slice_mut(first * heads * d..));
        let (cos, sin) = (cos.slice(first * (d / 2)..), sin.slice(first * (d / 2)..));
        let batch = Rows::of(rows.iter().copied())?;
        let blocks = blocks((t, rows.len(), 1), THREADS, 0);
        launch!(&function, blocks, &x, &bias, &cos, &sin, &mut out, &batch, &heads_of, &kv_of, &head_dim);
    }
    Ok(Some(tensor(out, &device, (r, t, heads, d))))
}
