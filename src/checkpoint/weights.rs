//! The weights of a model under construction: every layer loads its tensors by key and shape.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Error, Result, Shape, Tensor, Var};

use super::archive::Archive;
use super::header::{Fault, Stored};
use super::init::Init;
use super::synthetic;
use super::trainable::Trainable;
use super::weight_type::Matrices;
use crate::ops::{Filters, Int8Filters, Int8Matrix, WeightMatrix};

/// More faults than this, or a faulty tensor of more elements, end a check: the config is nonsense.
const MAX_PROBLEMS: usize = 100_000;
const MAX_ELEMENTS: usize = 1 << 30;

/// Tensors by key, under a prefix.
#[derive(Clone, Debug)]
pub struct Weights {
    prefix: String,
    unused: bool,
    matrices: Matrices,
    /// In place of the store's.
    dtype: Option<DType>,
    store: Arc<Store>,
    device: Device,
}

#[derive(Debug)]
enum Store {
    /// Files to read from, as a type; a later file hides keys of an earlier one.
    Files(Vec<Arc<Archive>>, DType),
    /// The same, but nothing is read: faults are collected instead.
    Plan(Vec<Arc<Archive>>, DType, Mutex<Problems>),
    Trainable {
        seed: u64,
        state: Mutex<Trainable>,
    },
    /// Tensors in memory.
    Tensors(BTreeMap<String, Tensor>),
    /// Random numbers.
    Synthetic(DType),
    /// No file: the tensors that are loaded are recorded.
    Inventory(Mutex<BTreeMap<String, Request>>),
}

/// A tensor that a model loads.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) shape: Vec<usize>,
    /// Not [unused](Weights::unused).
    pub(super) required: bool,
    /// Loaded as a [matrix](Weights::matrix).
    pub(super) matrix: bool,
    /// Its initial values in training.
    pub(super) init: Init,
    /// Its type, whatever that of the others is.
    pub(super) dtype: Option<DType>,
}

/// Faults by key, in the order of loading.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub(super) list: Vec<(String, Fault)>,
    seen: HashSet<String>,
}

impl Weights {
    /// Reads from safetensors files as `dtype`; a later file hides keys of an earlier one.
    pub fn from_safetensors(files: &[PathBuf], dtype: DType, device: &Device) -> Result<Self> {
        let open = |path: &PathBuf| Archive::open(path).map(Arc::new).map_err(|e| Error::Msg(e.message));
        let archives = files.iter().map(open).collect::<Result<_>>()?;
        Ok(Self::new(Store::Files(archives, dtype), device))
    }

    /// Trainable weights from nothing but a seed.
    pub fn trainable(seed: u64, device: &Device) -> Self {
        Self::trainable_from(BTreeMap::new(), seed, device)
    }

    /// Trainable weights that start from `known` where it has their keys, elsewhere from the seed.
    pub fn trainable_from(known: BTreeMap<String, Tensor>, seed: u64, device: &Device) -> Self {
        let state = Mutex::new(Trainable { known, vars: BTreeMap::new() });
        Self::new(Store::Trainable { seed, state }, device)
    }

    /// Tensors in memory, used as they are: they share their storage with the model.
    pub fn from_tensors(tensors: BTreeMap<String, Tensor>, device: &Device) -> Self {
        Self::new(Store::Tensors(tensors), device)
    }

    /// Reads from open files; a later file hides keys of an earlier one.
    pub(super) fn from_archives(archives: Vec<Arc<Archive>>, dtype: DType, device: &Device) -> Self {
        Self::new(Store::Files(archives, dtype), device)
    }

    /// Weights that read nothing: tensors are a zero broadcast to their shape, and
    /// [`Self::problems`] lists the faults that building a model on them found in the file.
    pub(super) fn plan(archives: Vec<Arc<Archive>>, dtype: DType) -> Self {
        Self::new(Store::Plan(archives, dtype, Mutex::default()), &Device::Cpu)
    }

    /// Weights without a file, whose tensors are a zero broadcast to their shape:
    /// [`Self::requested`] then lists the keys and shapes of a model without its memory.
    pub fn inventory() -> Self {
        Self::new(Store::Inventory(Mutex::default()), &Device::Cpu)
    }

    /// Whether tensors have numbers. In a plan and an [inventory](Self::inventory)
    /// they have a shape alone, so that no config can make them allocate.
    pub fn has_numbers(&self) -> bool {
        !self.unused && !matches!(*self.store, Store::Plan(..) | Store::Inventory(_))
    }

    /// What `compute` makes of loaded tensors, of this shape; where tensors [have no
    /// numbers](Self::has_numbers), a zero broadcast to it.
    pub fn derive(&self, shape: impl Into<Shape>, compute: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        if self.has_numbers() { compute() } else { placeholder(shape) }
    }

    /// Random weights as `dtype`, made quickly when they are loaded.
    pub fn synthetic(dtype: DType, device: &Device) -> Self {
        Self::new(Store::Synthetic(dtype), device)
    }

    fn new(store: Store, device: &Device) -> Self {
        let (prefix, store) = (String::new(), Arc::new(store));
        Self { prefix, unused: false, matrices: Matrices::Tensors, dtype: None, store, device: device.clone() }
    }

    /// The weights below `name`: keys are joined with dots.
    pub fn pp(&self, name: impl Display) -> Self {
        Self { prefix: self.key(name), ..self.clone() }
    }

    /// The same place, for tensors that public checkpoints hold but the model does without: they
    /// are never read, and may be missing.
    pub fn unused(&self) -> Self {
        Self { unused: true, ..self.clone() }
    }

    /// The same weights, with [matrices](Self::matrix) stored in another way than tensors.
    /// Trainable weights stay f32 tensors, but with blocks of BF16 they are trained in mixed
    /// precision.
    pub fn with_matrices(&self, matrices: Matrices) -> Self {
        Self { matrices, ..self.clone() }
    }

    /// The same place, with tensors that are read or made up as a type.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype: Some(dtype), ..self.clone() }
    }

    fn key(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// Where the tensors are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of loaded tensors.
    pub fn dtype(&self) -> DType {
        let stored = match &*self.store {
            Store::Files(_, dtype) | Store::Plan(_, dtype, _) | Store::Synthetic(dtype) => *dtype,
            Store::Trainable { .. } | Store::Tensors(_) | Store::Inventory(_) => DType::F32,
        };
        self.dtype.unwrap_or(stored)
    }

    /// Every trainable tensor so far; none unless the weights are trainable.
    pub fn vars(&self) -> BTreeMap<String, Var> {
        match &*self.store {
            Store::Trainable { state, .. } => lock(state).vars.clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Keys and shapes loaded from an [inventory](Self::inventory) so far, [unused](Self::unused)
    /// ones included; none of other weights.
    pub fn requested(&self) -> BTreeMap<String, Vec<usize>> {
        self.requests().into_iter().map(|(key, requested)| (key, requested.shape)).collect()
    }

    /// As [`Self::requested`], with whether each is required.
    pub(super) fn requests(&self) -> BTreeMap<String, Request> {
        match &*self.store {
            Store::Inventory(requested) => lock(requested).clone(),
            _ => BTreeMap::new(),
        }
    }

    /// Bytes of everything that was loaded from an [inventory](Self::inventory), as `dtype`, with
    /// matrices stored as `matrices`.
    pub fn bytes(&self, dtype: DType, matrices: Matrices) -> u64 {
        let bytes = |requested: &Request| {
            let elements: usize = requested.shape.iter().product();
            let dtype = requested.dtype.unwrap_or(dtype);
            match matrices {
                Matrices::Bytes if requested.matrix && Int8Matrix::supports(requested.shape[1]) => {
                    elements + 4 * requested.shape[0]
                }
                Matrices::Bytes if matches!(requested.shape[..], [o, c, k, l] if Int8Filters::supports([o, c, k, l])) => {
                    elements + 4 * requested.shape[0]
                }
                Matrices::Blocks(blocks) if requested.matrix => match fitting(blocks, requested.shape[1]) {
                    Some(blocks) => elements / blocks.block_size() * blocks.type_size(),
                    None => elements * dtype.size_in_bytes(),
                },
                _ => elements * dtype.size_in_bytes(),
            }
        };
        self.requests().values().filter(|requested| requested.required).map(|requested| bytes(requested) as u64).sum()
    }

    /// What [`Self::plan`] found.
    pub(super) fn problems(&self) -> Vec<(String, Fault)> {
        match &*self.store {
            Store::Plan(_, _, problems) => lock(problems).list.clone(),
            _ => Vec::new(),
        }
    }

    /// One tensor. `init` is the initial value of a trainable tensor that is not known.
    ///
    /// Errors: a key that is not there, unless the weights are trainable, or has another shape;
    /// none of unused ones and of an inventory.
    pub fn get(&self, shape: impl Into<Shape>, name: &str, init: Init) -> Result<Tensor> {
        let (key, shape) = (self.key(name), shape.into());
        match &*self.store {
            Store::Inventory(requested) => {
                let (dims, required) = (shape.dims().to_vec(), !self.unused);
                let dtype = self.dtype;
                lock(requested).insert(key, Request { shape: dims, required, matrix: false, init, dtype });
                placeholder(shape)
            }
            _ if self.unused => placeholder(shape),
            Store::Files(archives, dtype) => {
                find(archives, &key, &shape)?.read(&key, self.dtype.unwrap_or(*dtype), &self.device)
            }
            Store::Plan(archives, dtype, problems) => {
                if let Err((key, fault)) = check(archives, &key, shape.dims()) {
                    lock(problems).add(key, fault, &shape)?;
                }
                Tensor::zeros((), *dtype, &Device::Cpu)?.broadcast_as(shape)
            }
            Store::Tensors(tensors) => match tensors.get(&key) {
                Some(tensor) if tensor.shape() == &shape => Ok(tensor.clone()),
                Some(tensor) => {
                    let (found, expected) = (tensor.dims().to_vec(), shape.dims().to_vec());
                    Err(Error::Msg(format!("{key}: {}", Fault::Shape { found, expected })))
                }
                None => Err(Error::Msg(format!("{key}: {}", Fault::Missing))),
            },
            Store::Synthetic(dtype) => synthetic::tensor(&shape, init, self.dtype.unwrap_or(*dtype), &self.device),
            Store::Trainable { seed, state } => lock(state).get(key, shape, init, *seed, &self.device),
        }
    }

    /// As [`Self::get`], for the weights (rows, columns) of a linear layer or an embedding table.
    /// Blocks of a file stay blocks; where the columns do not divide into blocks of the type, Q8_0
    /// or none are used.
    pub fn matrix(&self, shape: (usize, usize), name: &str, init: Init) -> Result<WeightMatrix> {
        match &*self.store {
            Store::Inventory(requested) => {
                let required = !self.unused;
                let wish = Request { shape: vec![shape.0, shape.1], required, matrix: true, init, dtype: None };
                lock(requested).insert(self.key(name), wish);
                placeholder(shape).map(WeightMatrix::Dense)
            }
            Store::Synthetic(_) => match (self.matrices, self.blocks(shape.1)) {
                (_, Some(blocks)) => synthetic::matrix(shape, init, blocks, &self.device),
                (Matrices::Bytes, _) if self.keeps_bytes() && Int8Matrix::supports(shape.1) => {
                    let (bytes, scales) = synthetic::bytes(shape, init);
                    Int8Matrix::new(bytes.into(), &scales, shape).map(WeightMatrix::Int8)
                }
                _ => self.get(shape, name, init).map(WeightMatrix::Dense),
            },
            Store::Files(archives, _) if !self.unused => {
                let key = self.key(name);
                let archive = find(archives, &key, &shape.into())?;
                let stored = match archive.entry(&key).map(|entry| entry.stored) {
                    Some(Stored::Blocks(blocks)) => Some(blocks),
                    _ => self.blocks(shape.1),
                };
                // On a GPU, types of 16 bits or more are tensors.
                let plain = |blocks: &GgmlDType| blocks.block_size() == 1 && !self.device.is_cpu();
                match stored.filter(|blocks| !plain(blocks)) {
                    Some(blocks) => archive.read_blocks(&key, blocks, &self.device),
                    None if self.keeps_bytes() && archive.is_bytes(&key) && Int8Matrix::supports(shape.1) => {
                        let (bytes, scales) = archive.read_bytes(&key)?;
                        Int8Matrix::new(bytes, &scales, shape).map(WeightMatrix::Int8)
                    }
                    None => self.get(shape, name, init).map(WeightMatrix::Dense),
                }
            }
            Store::Trainable { .. } if self.matrices == Matrices::Blocks(GgmlDType::BF16) => {
                self.get(shape, name, init).map(WeightMatrix::Mixed)
            }
            _ => self.get(shape, name, init).map(WeightMatrix::Dense),
        }
    }

    /// Every tensor that was loaded from an [inventory](Self::inventory), as a GGUF file stores it:
    /// matrices in the blocks of these weights, others in f32.
    pub fn all_blocks(&self, requested: &Self) -> Result<Vec<(String, QTensor)>> {
        let tensor = |(key, Request { shape, matrix, init, .. }): (String, Request)| {
            if let (true, &[rows, columns]) = (matrix, &shape[..]) {
                match self.matrix((rows, columns), &key, init)? {
                    WeightMatrix::Packed(blocks) => return Ok((key, blocks.to_qtensor()?)),
                    WeightMatrix::Blocks { blocks, .. } => {
                        if let Some(blocks) = Arc::into_inner(blocks) {
                            return Ok((key, blocks));
                        }
                    }
                    _ => {}
                }
            }
            let tensor = self.get(shape, &key, init)?;
            Ok((key, QTensor::quantize(&tensor, GgmlDType::F32)?))
        };
        requested.requests().into_iter().map(tensor).collect()
    }

    /// As [`Self::get`], for the filters (O, C, K, K) of a convolution.
    pub fn filters(&self, shape: [usize; 4], name: &str, init: Init) -> Result<Filters> {
        if self.keeps_bytes() && !self.unused && Int8Filters::supports(shape) {
            match &*self.store {
                Store::Files(archives, _) => {
                    let key = self.key(name);
                    let archive = find(archives, &key, &shape.to_vec().into())?;
                    if archive.is_bytes(&key) {
                        let (bytes, scales) = archive.read_bytes(&key)?;
                        return Int8Filters::new(&bytes, &scales, shape).map(Filters::Int8);
                    }
                }
                Store::Synthetic(_) => {
                    let (bytes, scales) = synthetic::bytes((shape[0], shape[1..].iter().product()), init);
                    return Int8Filters::new(&bytes, &scales, shape).map(Filters::Int8);
                }
                _ => {}
            }
        }
        self.get(shape.to_vec(), name, init).map(Filters::Dense)
    }

    /// Whether int8 weights stay int8: a GPU has no kernel for them.
    fn keeps_bytes(&self) -> bool {
        self.matrices == Matrices::Bytes && self.device.is_cpu()
    }

    /// The block type of matrices with `columns` columns.
    fn blocks(&self, columns: usize) -> Option<GgmlDType> {
        if let Matrices::Blocks(blocks) = self.matrices { fitting(blocks, columns) } else { None }
    }
}

/// A zero broadcast to a shape: one number, whatever the shape.
pub(crate) fn placeholder(shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(shape.into())
}

/// The type of blocks for rows of so many columns.
pub(super) fn fitting(blocks: GgmlDType, columns: usize) -> Option<GgmlDType> {
    [blocks, GgmlDType::Q8_0].into_iter().find(|blocks| columns.is_multiple_of(blocks.block_size()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The archive that holds a tensor as it is expected; an error if there is none.
fn find<'a>(archives: &'a [Arc<Archive>], key: &str, shape: &Shape) -> Result<&'a Archive> {
    check(archives, key, shape.dims()).map_err(|(key, fault)| Error::Msg(format!("{key}: {fault}")))
}

/// The same, or what is wrong, with the key of the tensor that it is wrong with: that of its
/// scales, maybe.
pub(super) fn check<'a, A: Borrow<Archive>>(
    archives: &'a [A],
    key: &str,
    shape: &[usize],
) -> std::result::Result<&'a Archive, (String, Fault)> {
    let found = archives.iter().rev().find_map(|a| Some((a.borrow(), a.borrow().entry(key)?)));
    let (archive, entry) = found.ok_or_else(|| (key.to_string(), Fault::Missing))?;
    if entry.shape != shape {
        let (found, expected) = (entry.shape.clone(), shape.to_vec());
        return Err((key.to_string(), Fault::Shape { found, expected }));
    }
    archive.readable(key, entry).map(|()| archive)
}

impl Problems {
    fn add(&mut self, key: String, fault: Fault, shape: &Shape) -> Result<()> {
        if self.seen.insert(key.clone()) {
            self.list.push((key, fault));
        }
        let elements = shape.dims().iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        match elements.filter(|&n| n <= MAX_ELEMENTS && self.list.len() < MAX_PROBLEMS) {
            Some(_) => Ok(()),
            None => Err(Error::Msg("too much is wrong".into())),
        }
    }
}
