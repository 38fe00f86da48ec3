//! The files of a model to download: those that the program opens.

use crate::error::{Error, Result};

use super::{Id, listing::Remote, size};

/// Files of weights that a model folder may have; each may be in shards, or of another type by the
/// same stem.
const PARTS: [&str; 2] = ["model.safetensors", "image_tokenizer.safetensors"];
/// What transformers calls the PyTorch form of `model.safetensors`; it may be in shards as well.
const PYTORCH: &str = "pytorch_model.bin";
/// What an image tokenizer's own file is called, wherever it was published beside a transformer.
const TOKENIZERS: [&str; 2] = ["tokenflow_", "infinity_vae"];
/// Types that may replace a file of [`PARTS`]; the first that exists does.
const OTHER: [&str; 2] = ["gguf", "pt"];
/// The index of a pipeline in the layout of diffusers, with a folder for each network.
const PIPELINE: &str = "model_index.json";
/// Weights of a pipeline that the program reads: Z-Image's.
const PIPELINE_PARTS: [&str; 3] = [
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];
/// The small files beside them.
const PIPELINE_SETTINGS: [&str; 5] = [
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "transformer/config.json",
    "vae/config.json",
];
/// Extensions of weights that the program reads by any name.
const READ: [&str; 4] = ["safetensors", "gguf", "pt", "pth"];
/// Extensions of weights that it does not read.
const UNREAD: [&str; 8] = ["bin", "onnx", "onnx_data", "h5", "msgpack", "ckpt", "tflite", "mlmodel"];
/// Weights of a training run that go on with it, and are of no use otherwise.
const TRAINING: [&str; 5] = ["optimizer", "scheduler", "rng_state", "training_args", "scaler"];
/// How many names a message spells out.
const SHOWN: usize = 12;

/// The weights of a model.
#[derive(Default)]
pub(super) struct Weights<'a> {
    /// Files of weights.
    pub files: Vec<&'a Remote>,
    /// Indexes that name more of them.
    pub indexes: Vec<&'a Remote>,
}

impl<'a> Weights<'a> {
    /// Takes what the program would open as `part`: itself, the shards of its index, shards without
    /// an index, or a file of one of the `other` types; whether there is any.
    fn take(&mut self, files: &'a [Remote], part: &str, other: &[&str]) -> bool {
        let find = |name: &str| files.iter().find(|f| f.name == name);
        let (stem, kind) = part.rsplit_once('.').unwrap_or((part, ""));
        let shards = || files.iter().filter(|f| is_shard(&f.name, stem, kind));
        if let Some(whole) = find(part) {
            self.files.push(whole);
        } else if let Some(index) = find(&format!("{part}.index.json")) {
            self.indexes.push(index);
        } else if shards().next().is_some() {
            self.files.extend(shards());
        } else {
            let found = other.iter().find_map(|kind| find(&format!("{stem}.{kind}")));
            self.files.extend(found);
            return found.is_some();
        }
        true
    }
}

/// Whether `name` is `STEM-00001-of-00002.KIND`.
fn is_shard(name: &str, stem: &str, kind: &str) -> bool {
    let numbers = name.strip_prefix(stem).and_then(|n| n.strip_prefix('-')?.strip_suffix(kind)?.strip_suffix('.'));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.and_then(|n| n.split_once("-of-")).is_some_and(|(i, n)| digits(i) && digits(n))
}

/// The small files at the top of a repository: configs and text tokenizers.
pub(super) fn settings(files: &[Remote]) -> Vec<&Remote> {
    let wanted = |name: &str| match extension(name) {
        // An index is read where its weights are.
        "json" => !name.ends_with(".index.json") && name != "trainer_state.json",
        "jinja" => true,
        _ => name == "tokenizer.model",
    };
    files.iter().filter(|f| !f.name.contains('/') && wanted(&f.name)).collect()
}

/// The weights of a model.
///
/// Errors: [`crate::error::Kind::Model`] if there are none that the program reads, or several to
/// choose from.
pub(super) fn weights<'a>(id: &Id, files: &'a [Remote]) -> Result<Weights<'a>> {
    if let Some(pipeline) = pipeline(files) {
        return Ok(pipeline);
    }
    let mut taken = Weights { files: files.iter().filter(|f| is_tokenizer(&f.name)).collect(), ..Weights::default() };
    let [model, image_tokenizer] = PARTS;
    taken.take(files, image_tokenizer, &OTHER);
    if taken.take(files, model, &OTHER) || taken.take(files, PYTORCH, &[]) {
        return Ok(taken);
    }
    // No file has a known name: a single one is meant; of several the user has to choose.
    let known = |f: &&Remote| READ.contains(&extension(&f.name)) && !is_training(&f.name) && !f.name.contains('/');
    let others: Vec<&Remote> = files.iter().filter(known).collect();
    match &others[..] {
        [one] if extension(&one.name) != "gguf" && !is_adapter(&one.name) => {
            Ok(Weights { files: others, ..Weights::default() })
        }
        [] => Err(none(id, files)),
        [one] if is_adapter(&one.name) => {
            Err(Error::model(format!("{id} has only a LoRA adapter ({}), no model of its own", one.name))
                .hint("nextflow models pull OWNER/NAME of the model that it was made for"))
        }
        _ => Err(several(id, &others)),
    }
}

/// Weights and settings of a pipeline whose folders the program reads.
fn pipeline(files: &[Remote]) -> Option<Weights<'_>> {
    let find = |name: &str| files.iter().find(|f| f.name == name);
    find(PIPELINE)?;
    let files_of = PIPELINE_SETTINGS.iter().map(|name| find(name)).collect::<Option<Vec<_>>>()?;
    let mut taken = Weights { files: files_of, ..Weights::default() };
    PIPELINE_PARTS.iter().all(|part| taken.take(files, part, &[])).then_some(taken)
}

/// The shards beside an index, by their names.
pub(super) fn shards_beside<'a>(index: &Remote, files: &'a [Remote]) -> Vec<&'a Remote> {
    let part = index.name.strip_suffix(".index.json").unwrap_or(&index.name);
    let (stem, kind) = part.rsplit_once('.').unwrap_or((part, ""));
    files.iter().filter(|f| is_shard(&f.name, stem, kind)).collect()
}

/// The files named by the user.
///
/// Errors: [`crate::error::Kind::Model`] for a name that is not there.
pub(super) fn named<'a>(id: &Id, files: &'a [Remote], names: &[String]) -> Result<Vec<&'a Remote>> {
    let find = |name: &String| {
        files.iter().find(|f| f.name == *name).ok_or_else(|| {
            let close = files.iter().filter(|f| extension(&f.name) == extension(name)).collect::<Vec<_>>();
            let there = if close.is_empty() { String::new() } else { format!("; there are {}", list(&close)) };
            Error::model(format!("{id} has no file {name}{there}")).hint(format!("nextflow models pull {id}"))
        })
    };
    names.iter().map(find).collect()
}

fn several(id: &Id, files: &[&Remote]) -> Error {
    let first = &files[0].name;
    let what = match files.iter().all(|f| extension(&f.name) == "gguf") {
        true if files.len() == 1 => "only a GGUF file, and none called model.gguf, which nextflow quantize writes",
        true => "several GGUF files, and none called model.gguf, which nextflow quantize writes",
        false => "several files of weights, and none called model.safetensors",
    };
    Error::model(format!("{id} has {what}: {}", list(files)))
        .hint(format!("nextflow models pull {id} {first} downloads one of them"))
}

fn none(id: &Id, files: &[Remote]) -> Error {
    let unread: Vec<&Remote> = files.iter().filter(|f| UNREAD.contains(&extension(&f.name))).collect();
    let below: Vec<&Remote> =
        files.iter().filter(|f| f.name.contains('/') && READ.contains(&extension(&f.name))).collect();
    if let Some(file) = below.first() {
        let hint = format!("nextflow models pull {id} {} downloads one file", file.name);
        return Error::model(format!("{id} has no weights at its top, only in folders: {}", list(&below))).hint(hint);
    }
    match unread.is_empty() {
        true => Error::model(format!("{id} has no weights")).hint("nextflow models pull another OWNER/NAME"),
        false => Error::model(format!(
            "{id} has no weights that are read here (safetensors, GGUF, PyTorch's), only {}",
            list(&unread)
        ))
        .hint("nextflow models pull another OWNER/NAME, or convert them to safetensors"),
    }
}

/// Names with sizes, the first few of them.
fn list(files: &[&Remote]) -> String {
    let name = |f: &&Remote| match f.size {
        Some(bytes) => format!("{} ({})", f.name, size(bytes)),
        None => f.name.clone(),
    };
    let shown: Vec<String> = files.iter().take(SHOWN).map(name).collect();
    let more = if files.len() > SHOWN { format!(" and {} more", files.len() - SHOWN) } else { String::new() };
    shown.join(", ") + &more
}

fn extension(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.rsplit_once('.').map_or("", |(_, e)| e)
}

fn is_tokenizer(name: &str) -> bool {
    READ.contains(&extension(name)) && TOKENIZERS.iter().any(|t| name.starts_with(t))
}

fn is_training(name: &str) -> bool {
    TRAINING.iter().any(|t| name.starts_with(t))
}

fn is_adapter(name: &str) -> bool {
    name.starts_with("adapter_")
}
