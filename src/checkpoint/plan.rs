//! Builds modules on the weights of files, after a plan that checks every key and shape before a
//! tensor is read.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device};

use super::archive::Archive;
use super::header::Fault;
use super::layout;
use super::weights::Weights;
use crate::error::{Error, Kind, Result, told};

/// Problems that an error names.
const SHOWN: usize = 5;

/// As [`super::Source::load`], from the one file `path`; a message about what does not fit names
/// `layout`.
pub fn load_file<T>(
    path: &Path,
    layout: &str,
    dtype: DType,
    device: &Device,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<T> {
    from_archives(&path.display().to_string(), layout, vec![Archive::open(path)?], dtype, device, build)
}

/// Plans, then builds on the tensors.
pub(super) fn from_archives<T>(
    name: &str,
    layout: &str,
    archives: Vec<Archive>,
    dtype: DType,
    device: &Device,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<T> {
    let archives = plan(name, layout, archives, dtype, &build)?;
    build(&Weights::from_archives(archives, dtype, device)).map_err(|e| failure(name, e))
}

/// Builds without reading a tensor. Returns the archives if they hold every tensor, in its shape.
pub(super) fn plan<T>(
    name: &str,
    layout: &str,
    archives: Vec<Archive>,
    dtype: DType,
    build: impl Fn(&Weights) -> candle_core::Result<T>,
) -> Result<Vec<Arc<Archive>>> {
    let archives: Vec<_> = archives.into_iter().map(Arc::new).collect();
    let plan = Weights::plan(archives.clone(), dtype);
    let planned = build(&plan).map(drop);
    let problems = plan.problems();
    if !problems.is_empty() {
        let name = if let [archive] = &archives[..] { archive.name() } else { name };
        return Err(layout::unread(&archives).unwrap_or_else(|| misfit(name, layout, &problems, planned.is_err())));
    }
    planned.map(|()| archives).map_err(|e| failure(name, e))
}

/// One sentence about a file that does not fit its config or layout; `cut` if the check stopped
/// early.
fn misfit(name: &str, layout: &str, problems: &[(String, Fault)], cut: bool) -> Error {
    let count = |is: fn(&Fault) -> bool, what: &str| match problems.iter().filter(|(_, f)| is(f)).count() {
        0 => None,
        n => Some(format!("{n} {what}")),
    };
    let counts = [
        count(|f| matches!(f, Fault::Missing), "missing"),
        count(|f| matches!(f, Fault::Shape { .. }), "wrongly shaped"),
        count(|f| matches!(f, Fault::Type(_)), "of another type"),
    ];
    let counts: Vec<String> = counts.into_iter().flatten().collect();
    let mut shown: Vec<String> = problems.iter().take(SHOWN).map(|(key, fault)| format!("{key}: {fault}")).collect();
    if problems.len() > SHOWN {
        shown.push(format!("and {} more", problems.len() - SHOWN));
    }
    let least = if cut { "at least " } else { "" };
    let message = format!("{name} does not fit {layout}, tensors {least}{}: {}", counts.join(", "), shown.join("; "));
    Error::model(message).hint("--model FOLDER, with all files in FOLDER from one checkpoint")
}

/// The error of a failed build; allocators report exhausted memory in their text only.
fn failure(name: &str, error: candle_core::Error) -> Error {
    let text = told(&error);
    let lower = text.to_lowercase().replace('_', " ");
    if lower.contains("out of memory") || lower.contains("memory allocation failed") {
        return Error::new(Kind::Memory, format!("not enough memory for {name}: {text}"))
            .hint("--device cpu")
            .because(error);
    }
    Error::model(format!("cannot load {name}: {text}")).hint("--model FOLDER with another checkpoint").because(error)
}
