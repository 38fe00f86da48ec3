//! Parameters on a GPU, those that are stepped alike side by side in one tensor: a launch takes longer than a small matrix.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use super::{BETA1, EPS, Pace, TINY, muon};
use crate::{error, ops};

/// What is stepped alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Matrices of so many rows and columns: (parameters, rows, columns).
    Muon(usize, usize),
    /// Numbers one after the other, with weight decay or without.
    AdamW { decays: bool },
}

impl Kind {
    fn of(name: &str, var: &Var) -> Self {
        match muon(name, var) {
            true => Self::Muon(var.dims()[0], var.elem_count() / var.dims()[0]),
            false => Self::AdamW { decays: var.rank() > 1 },
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
    value: Tensor,
    m: Tensor,
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

    pub(super) fn restore(&mut self, moment: impl Fn(&str, &str) -> error::Result<Tensor>) -> error::Result<()> {
        let device = self.value.device().clone();
        let all = |kind: &str| -> error::Result<Tensor> {
            let moments: Vec<Tensor> =
                self.params.iter().map(|(name, _)| moment(kind, name)).collect::<error::Result<_>>()?;
            Ok(joined(self.kind, &moments)?.to_device(&device)?)
        };
        let (m, v) = (all("m")?, self.v.is_some().then(|| all("v")).transpose()?);
        (self.m, self.v) = (m, v);
        Ok(())
    }

    /// The gradients; of what has none, zeros.
    fn gradients(&self, grads: &GradStore) -> Result<Tensor> {
        let grad = |(_, var): &(String, Var)| grads.get(var.as_tensor()).cloned().map_or_else(|| var.zeros_like(), Ok);
        joined(self.kind, &self.params.iter().map(grad).collect::<Result<Vec<_>>>()?)
    }

    /// Values and moments behind a step.
    fn stepped(&self, grad: &Tensor, pace: Pace) -> Result<(Tensor, Tensor, Option<Tensor>)> {
        let Pace { lr, beta2, step, .. } = pace;
        match (self.kind, &self.v) {
            (Kind::AdamW { decays }, Some(v)) => {
                let (decay, moments) = (if decays { pace.decay } else { 0.0 }, (&self.m, v));
                let (value, m, v) =
                    ops::adamw_stepped(&self.value, grad, moments, lr, [BETA1, beta2], EPS, decay, step)?;
                Ok((value, m, Some(v)))
            }
            _ => {
                let (value, m) = ops::muon_stepped(&self.value, grad, &self.m, lr, pace.decay)?;
                Ok((value, m, None))
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

/// One step of all, unless the norm of their gradients is not finite. Returns that norm, which is not waited for before the
/// step is under way.
pub(super) fn descend(groups: &mut [Group], grads: &GradStore, pace: Pace) -> Result<f64> {
    let grads = groups.iter().map(|group| group.gradients(grads)).collect::<Result<Vec<_>>>()?;
    let squares = grads.iter().map(|grad| grad.sqr()?.sum_all()).collect::<Result<Vec<_>>>()?;
    let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?;
    let scale = ((&norm + TINY)?.recip()? * pace.clip)?.minimum(1f32)?;
    let step = |(group, grad): (&Group, &Tensor)| group.stepped(&grad.broadcast_mul(&scale)?, pace);
    let stepped = groups.iter().zip(&grads).map(step).collect::<Result<Vec<_>>>()?;
    let norm = f64::from(norm.to_scalar::<f32>()?);
    if norm.is_finite() {
        groups.iter_mut().zip(stepped).try_for_each(|(group, stepped)| group.set(stepped))?;
    }
    Ok(norm)
}

/// First and second moments by `m.` and `v.` and the parameter's name.
pub(super) fn moments(groups: &[Group]) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for group in groups {
        for (kind, all) in [("m", Some(&group.m)), ("v", group.v.as_ref())] {
            let Some(all) = all else { continue };
            for (moment, (name, _)) in group.parts(all)?.into_iter().zip(&group.params) {
                tensors.insert(format!("{kind}.{name}"), moment);
            }
        }
    }
    Ok(tensors)
}
