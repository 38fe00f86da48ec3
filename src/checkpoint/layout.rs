//! The layout of a set of files: renamed to the published one, or named in an error if it is not
//! read.

use std::borrow::Borrow;

use super::archive::Archive;
use super::keys;
use crate::error::{Error, Result};

/// Renames the tensors of the files of one model, if they are Qwen2.5-VL's in another layout.
///
/// Errors: two tensors of one file that get the same name.
pub(super) fn publish(archives: &mut [Archive]) -> Result<()> {
    if !archives.iter().any(|archive| archive.has_key(keys::is_qwen)) {
        return Ok(());
    }
    archives
        .iter_mut()
        .filter(|archive| archive.has_key(|key| keys::published(key) != key))
        .try_for_each(Archive::publish)
}

/// The error of files whose tensors are none that any config can ask for: of a layout or an
/// encoding that is not read.
pub(super) fn unread(archives: &[impl Borrow<Archive>]) -> Option<Error> {
    const OTHER: &str = "use the model's safetensors as they were published, with --quant q8_0 or --quant q4_K";
    let named = |is: fn(&str) -> bool| archives.iter().map(Borrow::borrow).find(|a: &&Archive| a.has_key(is));
    let error =
        |archive: &Archive, what: &str, hint: &str| Some(Error::model(format!("{} {what}", archive.name())).hint(hint));
    if let Some(archive) = named(keys::is_llama_cpp) {
        return error(archive, "has llama.cpp's names of tensors (blk.0.attn_q.weight), which are not read", OTHER);
    }
    let whole = archives.iter().any(|archive| archive.borrow().has_key(keys::is_onecat));
    if let Some(archive) = named(keys::is_lora).filter(|_| !whole) {
        return error(archive, "holds a LoRA adapter, not the weights of a model", keys::MERGE);
    }
    if let Some(archive) = named(keys::is_quantised) {
        let what = "holds weights that were quantised for another program (qweight, weight_packed, absmax), \
                    which is not read";
        return error(archive, what, OTHER);
    }
    None
}
