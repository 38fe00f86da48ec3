//! Parameters on a GPU, those that are stepped alike side by side in one tensor: a launch takes
//! longer than a small matrix.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Shape, Tensor, Var};

use super::steps::{adamw_stepped, muon_stepped};
use super::{BETA1, EPS, Pace, TINY, is_matrix, muon};
use crate::error;

/// Parameters with the same kind of step.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Matrices of one size: (parameters, rows, columns).
    Muon(usize, usize),
    /// Numbers one after the other, with weight decay or without.
    AdamW { decays: bool },
}

impl Kind {
    fn of(name: &str, var: &Var) -> Self {
        match muon(name, var) {
            true => Self::Muon(var.dims()[0], var.elem_count() / var.dims()[0]),
            false => Self::AdamW { decays: is_matrix(var) },
        }
    }

    /// One of the tensors as it lies in that of all.
    fn shaped(self, one: &Tensor) -> Result<Tensor> {
        match self {
            Self::Muon(rows, columns) => one.reshape((1, rows, columns)),
            Self::AdamW { .. } => one.flatten_all(),
        }
    }
}

/// Parameters of one kind.
pub(super) struct Group {
    kind: Kind,
    params: Vec<(String, Var)>,
    pub(super) value: Tensor,
    pub(super) m: Tensor,
    /// Second moments; Muon has none.
    v: Option<Tensor>,
}

impl Group {
    /// The groups of these parameters.
    pub(super) fn all(params: &[(&String, &Var)]) -> Result<Vec<Self>> {
        let mut kinds: BTreeMap<Kind, Vec<(String, Var)>> = BTreeMap::new();
        for (name, var) in params {
            kinds.entry(Kind::of(name, var)).or_default().push((name.to_string(), (*var).clone()));
        }
        let group = |(kind, params): (Kind, Vec<(String, Var)>)| {
            let values: Vec<Tensor> = params.iter().map(|(_, var)| var.as_detached_tensor()).collect();
            let value = joined(kind, &values)?;
            let m = value.zeros_like()?;
            let v = if matches!(kind, Kind::Muon(..)) { None } else { Some(m.clone()) };
            Ok(Self { kind, params, value, m, v })
        };
        kinds.into_iter().map(group).collect()
    }

    /// Reads its parameters' parts by kind, name and shape.
    pub(super) fn restore(&mut self, part: impl Fn(&str, &str, &Shape) -> error::Result<Tensor>) -> error::Result<()> {
        let device = self.value.device().clone();
        let all = |kind: &str| -> error::Result<Tensor> {
            let part = |(name, var): &(String, Var)| part(kind, name, var.shape());
            let parts = self.params.iter().map(part).collect::<error::Result<Vec<_>>>()?;
            Ok(joined(self.kind, &parts)?.to_device(&device)?)
        };
        let v = self.v.is_some().then(|| all("v")).transpose()?;
        let state = (all("value")?, all("m")?, v);
        Ok(self.set(state)?)
    }

    /// The gradients, zeros for what has none; and, if there is such, ones for what has one.
    fn gradients(&self, grads: &GradStore) -> Result<(Tensor, Option<Tensor>)> {
        // candle lets a gradient remember what it was computed from.
        let grad = |(_, var): &(String, Var)| grads.get(var.as_tensor()).map(Tensor::detach);
        let all: Vec<Option<Tensor>> = self.params.iter().map(grad).collect();
        let there = |(grad, (_, var)): (&Option<Tensor>, &(String, Var))| match grad {
            Some(_) => var.ones_like(),
            None => var.zeros_like(),
        };
        let missing = all.iter().any(Option::is_none);
        let there = missing.then(|| all.iter().zip(&self.params).map(there).collect::<Result<Vec<_>>>()).transpose()?;
        let there = there.map(|there| joined(self.kind, &there)).transpose()?;
        let filled =
            all.into_iter().zip(&self.params).map(|(grad, (_, var))| grad.map_or_else(|| var.zeros_like(), Ok));
        Ok((joined(self.kind, &filled.collect::<Result<Vec<_>>>()?)?, there))
    }

    /// Values and moments after a step of what is `there`.
    fn stepped(&self, grad: &Tensor, there: Option<&Tensor>, pace: Pace) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let Pace { lr, beta2, step, .. } = pace;
        let only = |old: &Tensor, new: Tensor| match there {
            Some(there) => old + ((new - old)? * there)?,
            None => Ok(new),
        };
        match (self.kind, &self.v) {
            (Kind::AdamW { decays }, Some(second)) => {
                let (decay, moments) = (if decays { pace.decay } else { 0.0 }, (&self.m, second));
                let (value, m, v) = adamw_stepped(&self.value, grad, moments, lr, [BETA1, beta2], EPS, decay, step)?;
                Ok((only(&self.value, value)?, only(&self.m, m)?, Some(only(second, v)?)))
            }
            _ => {
                let (value, m) = muon_stepped(&self.value, grad, &self.m, lr, pace.decay)?;
                Ok((only(&self.value, value)?, only(&self.m, m)?, None))
            }
        }
    }

    fn set(&mut self, (value, m, v): (Tensor, Tensor, Option<Tensor>)) -> Result<()> {
        (self.value, self.m, self.v) = (value, m, v);
        self.parts(&self.value)?.iter().zip(&self.params).try_for_each(|(value, (_, var))| var.set(value))
    }

    /// The tensors of the parameters of such one of all.
    fn parts(&self, all: &Tensor) -> Result<Vec<Tensor>> {
        let mut first = 0;
        let part = |(_, var): &(String, Var)| {
            let count = if matches!(self.kind, Kind::Muon(..)) { 1 } else { var.elem_count() };
            first += count;
            all.narrow(0, first - count, count)?.reshape(var.shape())
        };
        self.params.iter().map(part).collect()
    }
}

fn joined(kind: Kind, tensors: &[Tensor]) -> Result<Tensor> {
    let shaped = tensors.iter().map(|tensor| kind.shaped(tensor)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&shaped, 0)
}

/// One step of all, unless the norm of their gradients is not finite. Returns that norm, which is
/// not waited for before the step is under way.
pub(super) fn descend(groups: &mut [Group], grads: &GradStore, pace: Pace) -> Result<f64> {
    let grads = groups.iter().map(|group| group.gradients(grads)).collect::<Result<Vec<_>>>()?;
    let squares = grads.iter().map(|(grad, _)| grad.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    let scale = ((&norm + TINY)?.recip()? * pace.clip)?.minimum(1f32)?;
    let step = |(group, (grad, there)): (&Group, &(Tensor, Option<Tensor>))| {
        group.stepped(&grad.broadcast_mul(&scale)?, there.as_ref(), pace)
    };
    let stepped = groups.iter().zip(&grads).map(step).collect::<Result<Vec<_>>>()?;
    let norm = f64::from(norm.to_scalar::<f32>()?);
    if norm.is_finite() {
        groups.iter_mut().zip(stepped).try_for_each(|(group, stepped)| group.set(stepped))?;
    }
    Ok(norm)
}

/// Values, first and second moments by `value.`, `m.` and `v.` and the parameter's name.
pub(super) fn state(groups: &[Group]) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for group in groups {
        for (kind, all) in [("value", Some(&group.value)), ("m", Some(&group.m)), ("v", group.v.as_ref())] {
            let Some(all) = all else { continue };
            for (part, (name, _)) in group.parts(all)?.into_iter().zip(&group.params) {
                tensors.insert(format!("{kind}.{name}"), part);
            }
        }
    }
    Ok(tensors)
}
