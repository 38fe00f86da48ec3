//! Keys and values of what a batch of sequences has seen.

use candle_core::{DType, Device, Result, Tensor};

use super::BackboneConfig;

/// Preallocated from the schedule: nothing grows while an image is drawn, and a conversation grows it in large steps. Every row has a length of its own, so rows
/// with prompts of different lengths need neither padding nor a mask.
#[derive(Debug)]
pub struct Cache {
    /// Per layer and row: keys and values, each (1, capacity, kv_heads, head_dim).
    layers: Vec<Vec<(Tensor, Tensor)>>,
    /// Positions filled in each row.
    lengths: Vec<usize>,
    capacity: usize,
}

impl Cache {
    /// Room for `capacity` positions in each of `rows` sequences.
    pub fn new(c: &BackboneConfig, rows: usize, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros((1, capacity, c.num_key_value_heads, c.head_dim()), dtype, device);
        let layer = || (0..rows).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<Vec<_>>>();
        let layers = (0..c.num_hidden_layers).map(|_| layer()).collect::<Result<_>>()?;
        Ok(Self { layers, lengths: vec![0; rows], capacity })
    }

    /// Makes room for `capacity` positions in a row; what is there stays. Grows by half at least, so that a conversation
    /// is not copied at every word.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let capacity = capacity.max(self.capacity + self.capacity / 2);
        for (keys, values) in self.layers.iter_mut().flatten() {
            for old in [keys, values] {
                let (rows, _, heads, d) = old.dims4()?;
                let new = Tensor::zeros((rows, capacity, heads, d), old.dtype(), old.device())?;
                new.slice_set(old, 1, 0)?;
                *old = new;
            }
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Forgets all but the first `length` positions of a row.
    pub fn truncate(&mut self, row: usize, length: usize) {
        self.lengths[row] = self.lengths[row].min(length);
    }

    /// Positions filled in a row.
    pub fn len(&self, row: usize) -> usize {
        self.lengths[row]
    }

    /// Whether no row holds anything.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&l| l == 0)
    }

    /// Writes keys and values (1, T, kv_heads, head_dim) of `row` behind what it holds and returns all of them.
    /// The row's length moves on only with [`Cache::advance`], after the last layer.
    pub(super) fn append(&self, layer: usize, row: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (start, tokens) = (self.lengths[row], k.dim(1)?);
        if start + tokens > self.capacity {
            candle_core::bail!("a sequence of {} does not fit a cache of {}", start + tokens, self.capacity);
        }
        let (keys, values) = &self.layers[layer][row];
        keys.slice_set(&k.contiguous()?, 1, start)?;
        values.slice_set(&v.contiguous()?, 1, start)?;
        Ok((keys.narrow(1, 0, start + tokens)?, values.narrow(1, 0, start + tokens)?))
    }

    /// All keys and values of `row`, with these (1, T, kv_heads, head_dim) in the place of the last T; nothing is written.
    pub(super) fn with_last(&self, layer: usize, row: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some(start) = self.lengths[row].checked_sub(k.dim(1)?) else {
            candle_core::bail!("a sequence of {} has no {} last tokens", self.lengths[row], k.dim(1)?);
        };
        let (keys, values) = &self.layers[layer][row];
        let join = |kept: &Tensor, new: &Tensor| Tensor::cat(&[&kept.narrow(1, 0, start)?, new], 1);
        Ok((join(keys, k)?, join(values, v)?))
    }

    pub(super) fn advance(&mut self, rows: std::ops::Range<usize>, tokens: usize) {
        self.lengths[rows].iter_mut().for_each(|l| *l += tokens);
    }
}
