//! The readers, inputs that each reads, and how those are mutated so that some still are.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{Cursor, Read, Write};
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{DType, Device, Tensor};
use image::{DynamicImage, ImageFormat};
use nextflow::checkpoint::{self, Inventory};
use nextflow::codes::{CodeFile, TokenizerSource};
use nextflow::generate::png_info::PngInfo;
use nextflow::text::Text;
use nextflow::{cli, pixels};
use serde_json::Value;

use super::mutate::Mutator;

/// A reader.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Safetensors,
    Pickle,
    Gguf,
    TokenizerJson,
    TokenizerModel,
    Config,
    Images,
    CodeFile,
    Jsonl,
}

/// A reader with the place for the files that it reads.
pub struct Reader {
    target: Target,
    dir: PathBuf,
}

fn data(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// All files of a folder of the tree, by extension.
fn folder(name: &str, extensions: &[&str]) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    let wanted = |path: &&PathBuf| path.extension().is_some_and(|e| extensions.iter().any(|wanted| e == *wanted));
    paths.iter().filter(wanted).filter_map(|path| std::fs::read(path).ok()).collect()
}

impl Target {
    pub const ALL: [Self; 9] = [
        Self::Safetensors,
        Self::Pickle,
        Self::Gguf,
        Self::TokenizerJson,
        Self::TokenizerModel,
        Self::Config,
        Self::Images,
        Self::CodeFile,
        Self::Jsonl,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Pickle => "pickle",
            Self::Gguf => "gguf",
            Self::TokenizerJson => "tokenizer-json",
            Self::TokenizerModel => "tokenizer-model",
            Self::Config => "config",
            Self::Images => "images",
            Self::CodeFile => "codes",
            Self::Jsonl => "jsonl",
        }
    }

    pub fn names() -> Vec<&'static str> {
        Self::ALL.map(Self::name).to_vec()
    }

    pub fn named(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|target| target.name() == name);
        found.ok_or_else(|| format!("no target {name}: {}", Self::names().join(", ")))
    }

    /// Inputs that the reader accepts.
    pub fn inputs(self) -> Vec<Vec<u8>> {
        match self {
            Self::Safetensors => vec![safetensors()],
            Self::Pickle => [folder("tests/data", &["pt"]), folder("tests/data/infinity", &["pth"])].concat(),
            Self::Gguf => vec![gguf()],
            Self::TokenizerJson => {
                vec![data("tests/data/qwen/tiny/tokenizer.json"), data("tests/data/qwen/tokenizer.json")]
            }
            Self::TokenizerModel => vec![data("tests/data/sentencepiece.model")],
            Self::Config => vec![data("assets/nano/config.json"), data("tests/data/qwen/tiny/config.json")],
            Self::Images => images(),
            Self::CodeFile => {
                let codes = codes();
                vec![codes.to_json().expect("codes"), codes.to_safetensors().expect("codes")]
            }
            Self::Jsonl => vec![JOBS.into()],
        }
    }

    /// A mutant of one of the inputs. Where a format has lengths and checksums around what is read,
    /// most mutants have right ones.
    pub fn mutant(self, mutator: &mut Mutator, pool: &[Vec<u8>]) -> Vec<u8> {
        let (mut input, other) = (mutator.pick(pool).clone(), mutator.pick(pool).clone());
        let raw = mutator.below(4) == 0;
        match self {
            _ if raw => mutator.bytes(&mut input, &other),
            Self::Safetensors => safetensors_mutant(mutator, &mut input),
            Self::CodeFile if input.first() != Some(&b'{') => safetensors_mutant(mutator, &mut input),
            Self::Pickle => pickle_mutant(mutator, &mut input, &other),
            Self::TokenizerJson | Self::Config | Self::CodeFile => json_mutant(mutator, &mut input, &other),
            Self::Jsonl => lines_mutant(mutator, &mut input),
            Self::Images => {
                mutator.bytes(&mut input, &other);
                mend_png(&mut input);
            }
            Self::Gguf | Self::TokenizerModel => mutator.bytes(&mut input, &other),
        }
        input
    }

    /// The reader, with what else its inputs need beside them.
    pub fn reader(self, dir: &Path) -> std::io::Result<Reader> {
        if self == Self::Config {
            let root = Path::new(env!("CARGO_MANIFEST_DIR"));
            for (name, of) in [("nano", "assets/nano"), ("qwen", "tests/data/qwen/tiny")] {
                std::fs::create_dir_all(dir.join(name))?;
                for entry in std::fs::read_dir(root.join(of))? {
                    let entry = entry?;
                    std::fs::copy(entry.path(), dir.join(name).join(entry.file_name()))?;
                }
            }
        }
        Ok(Reader { target: self, dir: dir.into() })
    }
}

impl Reader {
    /// Reads an input as the program would; whether it was read without an error.
    pub fn read(&self, input: &[u8]) -> bool {
        match self.target {
            Target::Safetensors => self.weights(input, "x.safetensors"),
            Target::Pickle => self.weights(input, "x.pt"),
            Target::Gguf => self.weights(input, "x.gguf"),
            Target::TokenizerJson => Text::from_bytes(input).is_ok_and(|text| use_text(&text)),
            Target::TokenizerModel => Text::from_sentencepiece(input).is_ok_and(|text| use_text(&text)),
            Target::Config => {
                // Whatever is no Qwen2.5-VL is read as a NextFlow.
                let qwen = input.windows(10).any(|part| part == b"qwen2_5_vl");
                let folder = self.dir.join(if qwen { "qwen" } else { "nano" });
                std::fs::write(folder.join("config.json"), input).is_ok() && self.cli(&["info".into(), folder.into()])
            }
            Target::Images => {
                let path = self.file(input, "x.png");
                let png = PngInfo::of_png(input).is_some();
                pixels::open(&path).is_ok_and(|image| image.width() > 0) || png
            }
            Target::CodeFile => {
                let codes = CodeFile::read(&self.file(input, "x.codes"));
                let codec = TokenizerSource::of_model(checkpoint::Source::Embedded);
                codec.is_ok_and(|codec| codes.is_ok_and(|codes| codes.check(&codec).is_ok()))
            }
            Target::Jsonl => {
                let (file, out) = (self.file(input, "x.jsonl"), self.dir.join("out"));
                let flags = ["--dry-run", "-q", "--keep-going", "--out-dir"].map(OsString::from);
                let mut args: Vec<OsString> = vec!["gen".into(), "--jsonl".into(), file.into()];
                args.extend(flags);
                args.push(out.into());
                self.cli(&args)
            }
        }
    }

    fn file(&self, input: &[u8], name: &str) -> PathBuf {
        let path = self.dir.join(name);
        std::fs::write(&path, input).expect("the folder can be written");
        path
    }

    fn weights(&self, input: &[u8], name: &str) -> bool {
        let path = self.file(input, name);
        Inventory::open(&path).is_ok() && checkpoint::load(&path).is_ok()
    }

    fn cli(&self, args: &[OsString]) -> bool {
        let args = std::iter::once("nextflow".into()).chain(args.iter().cloned());
        cli::parse(args).is_ok_and(|cli| cli.is_some_and(|cli| cli::run(cli.command).is_ok()))
    }
}

const JOBS: &str = r#"{"prompt": "a cat", "out": "a/cat.png", "seed": 7, "size": "16:9", "cfg": 3.0, "cfg_until": 2}
{"prompt": "a blue star", "id": "star", "negative": "red", "temperature": 0.5, "top_k": 50, "top_p": 0.9, "draft": 1}
"#;

fn use_text(text: &Text) -> bool {
    let ids = text.encode("A red apple \u{4e00}\u{53ea}\u{732b}, 3 x 4! \u{fdfa} <|im_start|>\n\n  end");
    ids.is_ok_and(|ids| text.decode(&ids).is_ok())
}

fn safetensors() -> Vec<u8> {
    let tensor = |dtype, shape: &[usize]| Tensor::ones(shape, dtype, &Device::Cpu).expect("a tensor");
    let tensors = HashMap::from([
        ("a.weight", tensor(DType::F32, &[4, 3])),
        ("b.weight", tensor(DType::BF16, &[2, 2, 2])),
        ("c.weight", tensor(DType::U8, &[4, 8])),
        ("c.weight.scale", tensor(DType::F32, &[4])),
        ("empty", tensor(DType::F16, &[0, 5])),
    ]);
    safetensors::serialize(tensors, Some(HashMap::from([("format".into(), "pt".into())]))).expect("a file")
}

fn gguf() -> Vec<u8> {
    let tensor = |shape: (usize, usize), dtype| {
        QTensor::quantize(&Tensor::ones(shape, DType::F32, &Device::Cpu).expect("a tensor"), dtype).expect("blocks")
    };
    let (plain, blocks, wide) =
        (tensor((3, 4), GgmlDType::F32), tensor((2, 64), GgmlDType::Q8_0), tensor((1, 256), GgmlDType::Q4K));
    let name = gguf_file::Value::String("test".into());
    let mut file = Cursor::new(Vec::new());
    let tensors = [("a.weight", &plain), ("b.weight", &blocks), ("c.weight", &wide)];
    gguf_file::write(&mut file, &[("general.name", &name)], &tensors).expect("a file");
    file.into_inner()
}

fn images() -> Vec<Vec<u8>> {
    let image = DynamicImage::from(image::RgbaImage::from_fn(24, 16, |x, y| {
        image::Rgba([(x * 10) as u8, (y * 15) as u8, 99, (x * 8) as u8])
    }));
    let encoded = |image: DynamicImage, format| {
        let mut bytes = Cursor::new(Vec::new());
        image.write_to(&mut bytes, format).expect("an image");
        bytes.into_inner()
    };
    let mut all = folder("tests/data/images", &["png", "jpg", "webp"]);
    all.push(encoded(image.clone(), ImageFormat::Png));
    all.push(encoded(DynamicImage::from(image.to_rgba16()), ImageFormat::Png));
    all.push(encoded(DynamicImage::from(image.to_luma8()), ImageFormat::Png));
    all.push(encoded(DynamicImage::from(image.to_rgb8()), ImageFormat::Jpeg));
    all.push(encoded(image, ImageFormat::WebP));
    all
}

fn codes() -> CodeFile {
    let codec = TokenizerSource::of_model(checkpoint::Source::Embedded).expect("the embedded model");
    let scales = nextflow::generate::schedule::nearest(1.0).prefix(8).to_vec();
    let codes = scales.iter().map(|(h, w)| vec![3; h * w]).collect();
    let space = codec.space();
    CodeFile { model: codec.name, space, scales, codes }
}

fn json_mutant(mutator: &mut Mutator, input: &mut Vec<u8>, other: &[u8]) {
    match serde_json::from_slice::<Value>(input) {
        Ok(mut document) => {
            mutator.json(&mut document);
            *input = serde_json::to_vec(&document).expect("JSON");
        }
        Err(_) => mutator.bytes(input, other),
    }
}

/// Lines of which some have other values.
fn lines_mutant(mutator: &mut Mutator, input: &mut Vec<u8>) {
    let mut lines: Vec<Vec<u8>> = input.split(|&b| b == b'\n').map(<[u8]>::to_vec).collect();
    for _ in 0..1 << mutator.below(3) {
        let at = mutator.below(lines.len());
        json_mutant(mutator, &mut lines[at], b"{}");
        if mutator.below(4) == 0 {
            let line = lines[at].clone();
            lines.insert(at, line);
        }
    }
    lines.truncate(64);
    *input = lines.join(&b'\n');
}

/// Another header of the right length before the same data.
fn safetensors_mutant(mutator: &mut Mutator, input: &mut Vec<u8>) {
    let length = input.first_chunk().map_or(0, |&bytes| u64::from_le_bytes(bytes));
    let end = (length as usize).saturating_add(8).min(input.len());
    let mut header = input.get(8..end).unwrap_or_default().to_vec();
    json_mutant(mutator, &mut header, b"");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.extend(input.get(end..).unwrap_or_default());
    *input = bytes;
}

/// Another pickle in the same archive, whose checksums fit.
fn pickle_mutant(mutator: &mut Mutator, input: &mut Vec<u8>, other: &[u8]) {
    let Ok(mut archive) = zip::ZipArchive::new(Cursor::new(&*input)) else { return mutator.bytes(input, other) };
    let mut changed = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for i in 0..archive.len() {
        let Ok(mut entry) = archive.by_index(i) else { continue };
        let Ok(name) = entry.name().map(String::from) else { continue };
        let mut bytes = Vec::new();
        if entry.read_to_end(&mut bytes).is_err() {
            continue;
        }
        if name.ends_with("data.pkl") {
            mutator.bytes(&mut bytes, PICKLE);
        }
        if changed.start_file(name, options).is_err() || changed.write_all(&bytes).is_err() {
            return;
        }
    }
    if let Ok(file) = changed.finish() {
        *input = file.into_inner();
    }
}

/// Opcodes that build, memoise and repeat.
const PICKLE: &[u8] = b"\x80\x02}q\x00(]q\x01)\x85\x86\x87\x94h\x00j\x00\x00\x00\x00ccollections\nOrderedDict\n)RbsuaetX\x01\x00\x00\x00aK\x01M\x00\x01J\xff\xff\xff\x7f\x8a\x08\xff\xff\xff\xff\xff\xff\xff\xff\x88\x89NQ.2010";

/// Puts right checksums into the chunks of a PNG.
fn mend_png(input: &mut [u8]) {
    let mut at = 8;
    while input.starts_with(b"\x89PNG") && at + 12 <= input.len() {
        let length = u32::from_be_bytes([input[at], input[at + 1], input[at + 2], input[at + 3]]) as usize;
        let Some(end) = at.checked_add(8 + length).filter(|end| end + 4 <= input.len()) else { return };
        let mut crc = u32::MAX;
        for &byte in &input[at + 4..end] {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg());
            }
        }
        input[end..end + 4].copy_from_slice(&(!crc).to_be_bytes());
        at = end + 4;
    }
}
