//! Keys and values of what a sequence has seen.

use candle_core::{DType, Device, Result, Tensor};

use super::BackboneConfig;

/// Preallocated from the schedule: nothing grows while an image is drawn, and a conversation grows
/// it in large steps. Every row of a batch has one of its own, so rows with prompts of different
/// lengths need neither padding nor a mask.
#[derive(Debug)]
pub struct Cache {
    /// Keys and values of every layer, each (1, capacity, kv_heads, head_dim).
    layers: Vec<(Tensor, Tensor)>,
    /// Positions filled.
    length: usize,
    capacity: usize,
}

impl Cache {
    /// Room for `capacity` positions.
    pub fn new(c: &BackboneConfig, capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        Self::of_layers(c.num_hidden_layers, (c.num_key_value_heads, c.head_dim()), capacity, dtype, device)
    }

    /// Room for `capacity` positions of so many layers, whose keys and values are
    /// (heads, head_dim).
    pub(crate) fn of_layers(
        layers: usize,
        (heads, head_dim): (usize, usize),
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let zeros = || Tensor::zeros((1, capacity, heads, head_dim), dtype, device);
        let layers = (0..layers).map(|_| Ok((zeros()?, zeros()?))).collect::<Result<_>>()?;
        Ok(Self { layers, length: 0, capacity })
    }

    /// Makes room for `capacity` positions; what is there stays. Grows by half at least, so that a
    /// conversation is not copied at every word.
    pub fn reserve(&mut self, capacity: usize) -> Result<()> {
        if capacity <= self.capacity {
            return Ok(());
        }
        let capacity = capacity.max(self.capacity + self.capacity / 2);
        for (keys, values) in &mut self.layers {
            for old in [keys, values] {
                let (_, _, heads, d) = old.dims4()?;
                let new = Tensor::zeros((1, capacity, heads, d), old.dtype(), old.device())?;
                new.slice_set(old, 1, 0)?;
                *old = new;
            }
        }
        self.capacity = capacity;
        Ok(())
    }

    /// Forgets all but the first `length` positions.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Positions filled.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Holds what `other`, of the same model, holds, in place of what it held. Errors if there is
    /// no room.
    pub fn copy(&mut self, other: &Self) -> Result<()> {
        self.length = 0;
        for (layer, (keys, values)) in other.layers.iter().enumerate() {
            self.append(layer, &keys.narrow(1, 0, other.length)?, &values.narrow(1, 0, other.length)?)?;
        }
        self.advance(other.length);
        Ok(())
    }

    /// Writes keys and values (1, T, kv_heads, head_dim) after what it holds and returns all of
    /// them. The length moves on only with [`Cache::advance`], after the last layer.
    pub(crate) fn append(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (start, tokens) = (self.length, k.dim(1)?);
        if start + tokens > self.capacity {
            candle_core::bail!("a sequence of {} does not fit a cache of {}", start + tokens, self.capacity);
        }
        let (keys, values) = &self.layers[layer];
        keys.slice_set(&k.contiguous()?, 1, start)?;
        values.slice_set(&v.contiguous()?, 1, start)?;
        self.first(layer, start + tokens)
    }

    /// Keys and values of a layer with all the room, and how many positions are filled.
    pub(super) fn layer(&self, layer: usize) -> (&Tensor, &Tensor, usize) {
        let (keys, values) = &self.layers[layer];
        (keys, values, self.length)
    }

    /// The first `length` keys and values of a layer, filled or about to be.
    pub(super) fn first(&self, layer: usize, length: usize) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &self.layers[layer];
        Ok((keys.narrow(1, 0, length)?, values.narrow(1, 0, length)?))
    }

    /// All keys and values, and these (1, T, kv_heads, head_dim) after them; nothing is written.
    pub(crate) fn followed_by(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        if self.length == 0 {
            return Ok((k.clone(), v.clone()));
        }
        let (keys, values) = self.first(layer, self.length)?;
        Ok((Tensor::cat(&[&keys, k], 1)?, Tensor::cat(&[&values, v], 1)?))
    }

    /// All keys and values, with these (1, T, kv_heads, head_dim) in the place of the last T;
    /// nothing is written.
    pub(super) fn with_last(&self, layer: usize, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let Some(start) = self.length.checked_sub(k.dim(1)?) else {
            candle_core::bail!("a sequence of {} has no {} last tokens", self.length, k.dim(1)?);
        };
        let (keys, values) = &self.layers[layer];
        let join = |kept: &Tensor, new: &Tensor| Tensor::cat(&[&kept.narrow(1, 0, start)?, new], 1);
        Ok((join(keys, k)?, join(values, v)?))
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.length += tokens;
    }
}
