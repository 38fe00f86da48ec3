use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use tempfile::TempDir;

use super::*;
use crate::error::{Error, Kind};

const FILE: &str = "model.safetensors";

fn file(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, data].concat()
}

/// A folder with `bytes` as its only safetensors file.
fn folder(bytes: &[u8]) -> (TempDir, Source) {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join(FILE), bytes).unwrap();
    let source = Source::Folder(dir.path().into());
    (dir, source)
}

fn get_a(w: &Weights) -> candle_core::Result<Tensor> {
    w.get(2, "a", Init::Ones)
}

fn load_a(source: &Source) -> Result<Tensor, Error> {
    source.load(FILE, DType::F32, &Device::Cpu, get_a)
}

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

const A: &str = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;

#[test]
fn broken_files_are_refused_and_named() {
    let one = |entry: &str, data: usize| file(format!("{{{entry}}}").as_bytes(), &vec![0; data]);
    let b = |from: usize, to: usize| format!(r#"{A},"b":{{"dtype":"F32","shape":[2],"data_offsets":[{from},{to}]}}"#);
    let sized = |shape: &str, offsets: &str| {
        one(&format!(r#""a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}"#), 8)
    };
    let huge_header = [&200_000_000u64.to_le_bytes()[..], b"{}"].concat();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "truncated"),
        ("short", vec![1, 2, 3], "truncated"),
        ("header longer than the file", huge_header, "a header of 200000000 bytes"),
        ("header cut", one(A, 8)[..30].to_vec(), "truncated"),
        ("data cut", one(A, 7), "truncated"),
        ("html", b"<!DOCTYPE html><html><body>404".to_vec(), "no safetensors file"),
        ("trailing", one(A, 12), "4 trailing bytes"),
        ("not UTF-8", file(b"{\"\xff\":1}", &[]), "not UTF-8"),
        ("not JSON", file(b"{oops}", &[]), "bad header"),
        ("list", file(b"[]", &[]), "bad header"),
        ("nested", file("[".repeat(100_000).as_bytes(), &[]), "bad header"),
        ("unknown dtype", one(&A.replace("F32", "F31"), 8), "bad header"),
        ("hole", one(&b(12, 20), 20), "invalid offset for tensor `b`"),
        ("overlap", one(&b(4, 12), 12), "invalid offset for tensor `b`"),
        ("backwards", sized("[2]", "[8,0]"), "invalid offset for tensor `a`"),
        ("length", sized("[3]", "[0,8]"), "invalid shape, data type, or offset"),
        ("overflow", sized("[9223372036854775807,16]", "[0,8]"), "overflow computing buffer size"),
        ("offsets past u64", sized("[2]", "[0,36893488147419103232]"), "bad header"),
        ("negative shape", sized("[-2]", "[0,8]"), "bad header"),
        ("twice", one(&format!("{A},{A}"), 8), "\"a\" is there twice"),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec(), "git-lfs pointer"),
    ];
    for (case, bytes, part) in cases {
        let (dir, source) = folder(&bytes);
        let error = load_a(&source).unwrap_err();
        assert_eq!(error.kind, Kind::Model, "{case}: {error}");
        assert!(error.message.contains(part), "{case}: {error}");
        assert!(error.message.contains(&dir.path().join(FILE).display().to_string()), "{case}: {error}");
        assert!(error.hint.is_some(), "{case}");
        // The same of a file in memory.
        let in_memory = archive::Archive::from_bytes("name".into(), bytes.leak()).map(drop).unwrap_err();
        assert!(in_memory.message.contains(part), "{case}: {in_memory}");
    }
}

/// Files are read, not mapped: there is no memory that could be gone.
#[test]
fn a_file_that_is_cut_while_it_is_open_is_an_error() {
    let (dir, source) = folder(&file(format!("{{{A}}}").as_bytes(), &[0; 8]));
    let path = dir.path().join(FILE);
    let cut = |w: &Weights| {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(20).unwrap();
        get_a(w)
    };
    let error = source.load(FILE, DType::F32, &Device::Cpu, cut).unwrap_err();
    assert_eq!(error.kind, Kind::Model, "{error}");
    assert!(error.message.contains(&path.display().to_string()) && error.hint.is_some(), "{error:?}");
}

#[test]
fn a_header_above_the_limit_is_not_read() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(FILE);
    std::fs::write(&path, 100_000_001u64.to_le_bytes()).unwrap();
    // Sparse: the file takes no space.
    std::fs::File::options().write(true).open(&path).unwrap().set_len(200_000_000).unwrap();
    let error = load_a(&Source::Folder(dir.path().into())).unwrap_err();
    assert!(error.message.contains("header of 100000001 bytes, more than"), "{error}");
}

#[test]
fn sound_headers_are_read() {
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{A},"e":{{"dtype":"I64","shape":[0,3],"data_offsets":[0,0]}}}}   "#
    );
    let data: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let bytes = file(header.as_bytes(), &data);
    let (_dir, source) = folder(&bytes);
    assert_eq!(load_a(&source).unwrap().to_vec1::<f32>().unwrap(), [1.5, -2.0]);
    let archive = archive::Archive::from_bytes("name".into(), bytes.leak()).unwrap();
    assert_eq!(archive.read("a", DType::F32, &Device::Cpu).unwrap().to_vec1::<f32>().unwrap(), [1.5, -2.0]);
}

#[test]
fn all_that_does_not_fit_is_told_at_once_before_anything_is_built() {
    let dir = TempDir::new().unwrap();
    let mut tensors: BTreeMap<String, Tensor> =
        (0..4).map(|i| (format!("x.{i}"), tensor(&[0.0; 6], &[2, 3]))).collect();
    tensors.insert("unused".into(), tensor(&[1.0], &[1]));
    save(&dir.path().join(FILE), tensors, None).unwrap();
    let source = Source::Folder(dir.path().into());
    let builds = Cell::new(0);
    let build = |w: &Weights| {
        builds.set(builds.get() + 1);
        w.get((2, 3), "x.0", Init::Zeros)?;
        // A zero broadcast to its shape takes one element.
        assert_eq!(w.get((1 << 15, 1 << 15), "large", Init::Zeros)?.stride(), [0, 0]);
        for i in 1..4 {
            w.pp("x").get(4, &i.to_string(), Init::Zeros)?;
        }
        (0..3).try_for_each(|i| w.pp("y").pp(i).get(1, "weight", Init::Zeros).map(drop))
    };
    let error = source.load(FILE, DType::F32, &Device::Cpu, build).unwrap_err();
    assert_eq!((error.kind, builds.get()), (Kind::Model, 1));
    let expected = "does not fit config.json, tensors 4 missing, 3 wrongly shaped: large: missing; \
                    x.1: found (2, 3), expected (4); x.2: found (2, 3), expected (4); x.3: found (2, 3), expected (4); \
                    y.0.weight: missing; and 2 more";
    assert!(error.message.contains(expected), "{error}");
    assert!(error.message.contains(&dir.path().join(FILE).display().to_string()));
    // Extra keys are no fault.
    source.load(FILE, DType::F32, &Device::Cpu, |w| w.get((2, 3), "x.0", Init::Zeros)).unwrap();
}

#[test]
fn nonsense_shapes_end_the_check() {
    let (_dir, source) = folder(&file(format!("{{{A}}}").as_bytes(), &[0; 8]));
    for shape in [(usize::MAX, 2), (1 << 40, 1)] {
        let error = source.load(FILE, DType::F32, &Device::Cpu, |w| w.get(shape, "b", Init::Zeros)).unwrap_err();
        assert!(error.message.contains("at least 1 missing"), "{error}");
    }
    let endless = |w: &Weights| (0..u64::MAX).try_for_each(|i| w.pp(i).get(1, "w", Init::Zeros).map(drop));
    let error = source.load(FILE, DType::F32, &Device::Cpu, endless).unwrap_err();
    assert!(error.message.contains("at least 100000 missing"), "{error}");
}

#[test]
fn integers_are_no_weights() {
    let (_dir, source) = folder(&file(format!("{{{}}}", A.replace("F32", "I32")).as_bytes(), &[0; 8]));
    let error = load_a(&source).unwrap_err();
    assert!(error.message.contains("1 of another type: a: stored as I32"), "{error}");
}

#[test]
fn types_are_converted_and_bf16_makes_a_round_trip() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("w.safetensors");
    let values: Vec<f32> = (0..200_000).map(|i| (i as f32 - 1e5) * 0.37).collect();
    for (stored, round) in [
        (DType::F32, (|v| v) as fn(f32) -> f32),
        (DType::BF16, |v| bf16::from_f32(v).to_f32()),
        (DType::F16, |v| half::f16::from_f32(v).to_f32()),
    ] {
        save(&path, BTreeMap::from([("a".into(), tensor(&values, &[200_000]).to_dtype(stored).unwrap())]), None)
            .unwrap();
        let expected: Vec<f32> = values.iter().map(|&v| round(v)).collect();
        for requested in [DType::F32, DType::BF16, DType::F16, DType::F64] {
            let weights = Weights::from_safetensors(std::slice::from_ref(&path), requested, &Device::Cpu).unwrap();
            let read = weights.get(200_000, "a", Init::Zeros).unwrap();
            assert_eq!(read.dtype(), requested);
            let expected = tensor(&expected, &[200_000]).to_dtype(requested).unwrap().to_dtype(DType::F32).unwrap();
            let read = read.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(read, expected.to_vec1::<f32>().unwrap(), "{stored:?} as {requested:?}");
        }
    }
}

#[test]
fn a_later_file_hides_an_earlier_one() {
    let dir = TempDir::new().unwrap();
    let paths: Vec<PathBuf> = (0..2).map(|i| dir.path().join(format!("{i}"))).collect();
    for (i, path) in paths.iter().enumerate() {
        save(path, BTreeMap::from([("a".into(), tensor(&[i as f32; 2], &[2]))]), None).unwrap();
    }
    let weights = Weights::from_safetensors(&paths, DType::F32, &Device::Cpu).unwrap();
    assert_eq!(get_a(&weights).unwrap().to_vec1::<f32>().unwrap(), [1.0, 1.0]);
    assert!(weights.get(3, "a", Init::Zeros).unwrap_err().to_string().contains("a: found (2), expected (3)"));
    assert!(weights.vars().is_empty());
}

#[test]
fn initial_values_depend_on_seed_and_key_alone() {
    let draw = |seed: u64, names: &[&str]| -> BTreeMap<String, Vec<f32>> {
        let weights = Weights::trainable(seed, &Device::Cpu);
        for name in names {
            weights.pp("layer").get((3, 4), name, Init::Normal { std: 0.5 }).unwrap();
        }
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1().unwrap();
        weights.vars().into_iter().map(|(key, var)| (key, values(&var))).collect()
    };
    let there = draw(7, &["a", "b", "c"]);
    assert_eq!(there, draw(7, &["c", "a", "b"]));
    assert_eq!(there.keys().collect::<Vec<_>>(), ["layer.a", "layer.b", "layer.c"]);
    assert_ne!(there["layer.a"], there["layer.b"]);
    assert_ne!(there["layer.a"], draw(8, &["a"])["layer.a"]);
    // Models in training go on only if these never change.
    let rng = crate::rng::Rng::new(7, 0x407a_c983_db7a_45cb, crate::rng::Stream::Train, 0);
    assert_eq!(there["layer.a"][5], (rng.normal(5) * 0.5) as f32);
}

#[test]
fn trainable_weights_start_from_what_is_known() {
    let known = BTreeMap::from([("a".to_string(), tensor(&[3.0, 4.0], &[2])), ("b".into(), tensor(&[5.0], &[1]))]);
    let weights = Weights::trainable_from(known, 0, &Device::Cpu);
    assert_eq!(get_a(&weights).unwrap().to_vec1::<f32>().unwrap(), [3.0, 4.0]);
    assert_eq!(weights.get(2, "c", Init::Ones).unwrap().to_vec1::<f32>().unwrap(), [1.0, 1.0]);
    assert_eq!(weights.get(2, "b", Init::Ones).unwrap_err().to_string(), "b: found (1), expected (2)");
    // Whoever asks again gets the same variable.
    weights.vars()["a"].set(&tensor(&[8.0, 9.0], &[2])).unwrap();
    assert_eq!(get_a(&weights).unwrap().to_vec1::<f32>().unwrap(), [8.0, 9.0]);
}

#[test]
fn saving_replaces_a_file_as_a_whole() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(FILE);
    std::fs::write(&path, "old").unwrap();
    let metadata = std::collections::HashMap::from([("step".to_string(), "3".to_string())]);
    save(&path, BTreeMap::from([("a".into(), tensor(&[1.0, 2.0], &[2]))]), Some(metadata)).unwrap();
    assert!(load_a(&Source::Folder(dir.path().into())).is_ok());
    assert_eq!(super::metadata(&path).unwrap()["step"], "3");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "").unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions(), std::fs::metadata(&plain).unwrap().permissions());
    assert!(save(Path::new("/dev/null/x"), BTreeMap::new(), None).is_err());
}

#[test]
fn models_are_folders() {
    assert_eq!(Source::parse(None).unwrap(), Source::Embedded);
    assert_eq!(Source::parse(Some("nano")).unwrap(), Source::Embedded);
    let (dir, source) = folder(b"");
    let path = dir.path().display().to_string();
    assert_eq!(Source::parse(Some(&path)).unwrap(), source);
    assert_eq!(source.to_string(), path);
    let weights = format!("{path}/{FILE}");
    let error = Source::parse(Some(&weights)).unwrap_err();
    assert!(error.message.contains(&format!("the model {weights} is not a folder")));
    assert!(error.hint.is_some());
    let error = Source::parse(Some("no/such/folder")).unwrap_err();
    assert_eq!(error.kind, Kind::Model);
    assert!(error.message.contains("the model no/such/folder does not exist") && error.hint.is_some());
}

#[test]
fn missing_and_broken_json_is_a_model_error() {
    let (dir, source) = folder(b"");
    let error = source.read_config().unwrap_err();
    assert_eq!(error.kind, Kind::Model);
    assert!(error.message.ends_with("config.json is missing"), "{error}");
    assert!(source.text().err().unwrap().message.ends_with("tokenizer.json is missing"));
    for name in ["config.json", "tokenizer.json"] {
        std::fs::write(dir.path().join(name), "{\"a\": ").unwrap();
    }
    assert!(source.read_config().unwrap_err().message.contains("is not JSON"));
    assert_eq!(source.text().err().unwrap().kind, Kind::Model);
    std::fs::write(dir.path().join("config.json"), "{\"a\": 1}").unwrap();
    assert_eq!(source.read_config().unwrap()["a"], 1);
    std::fs::remove_file(dir.path().join(FILE)).unwrap();
    std::fs::create_dir(dir.path().join(FILE)).unwrap();
    assert!(load_a(&source).unwrap_err().message.ends_with("is not a file"));
}

#[cfg(feature = "nano")]
#[test]
fn the_built_in_model_is_whole() {
    assert!(Source::Embedded.read_config().unwrap().is_object());
    for name in [FILE, "image_tokenizer.safetensors"] {
        Source::Embedded.load(name, DType::F32, &Device::Cpu, |_| Ok(())).unwrap();
        let error =
            Source::Embedded.load(name, DType::F32, &Device::Cpu, |w| w.get(1, "none", Init::Ones)).unwrap_err();
        assert_eq!(
            error.message,
            format!("{name} of the built-in model does not fit config.json, tensors 1 missing: none: missing")
        );
    }
}

#[cfg(not(feature = "nano"))]
#[test]
fn a_build_without_a_model_says_so() {
    let error = Source::Embedded.read_config().unwrap_err();
    assert_eq!((error.kind, error.hint.as_deref()), (Kind::Model, Some("--model FOLDER")));
}

#[test]
fn bytes_with_a_scale_per_row_come_back_within_half_a_step() {
    let (dir, source) = folder(&[]);
    let values: Vec<f32> = (0..600).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0 + i as f32 / 100.0).collect();
    let mut tensors = BTreeMap::new();
    quantise(&mut tensors, "a".into(), &tensor(&values, &[3, 4, 50])).unwrap();
    save(&dir.path().join(FILE), tensors.clone(), None).unwrap();
    let get = |w: &Weights| w.get((3, 4, 50), "a", Init::Zeros);
    let back = source.load(FILE, DType::F32, &Device::Cpu, get).unwrap();
    for (row, want) in values.chunks_exact(200).enumerate() {
        let step = want.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        let got = back.get(row).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() <= 0.501 * step));
    }
    let all = load(&dir.path().join(FILE)).unwrap();
    assert_eq!(all.keys().collect::<Vec<_>>(), ["a"]);
    assert_eq!(all["a"].dtype(), DType::F32);
    tensors.remove("a.scale");
    save(&dir.path().join(FILE), tensors, None).unwrap();
    assert_eq!(source.load(FILE, DType::F32, &Device::Cpu, get).unwrap_err().exit_code(), 3);
}

#[test]
fn shards_are_found_by_their_index() {
    let dir = TempDir::new().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = Source::Folder(dir.path().into());
    let index = |map: &str| std::fs::write(path(&format!("{FILE}.index.json")), format!(r#"{{"weight_map":{map}}}"#));
    for (name, key) in [("one", "a"), ("two", "b")] {
        save(&path(name), BTreeMap::from([(key.into(), tensor(&[1.0, 2.0], &[2]))]), None).unwrap();
    }
    index(r#"{"a":"one","b":"two"}"#).unwrap();
    let both = |w: &Weights| Ok((w.get(2, "a", Init::Zeros)?, w.get(2, "b", Init::Zeros)?));
    assert!(source.load(FILE, DType::F32, &Device::Cpu, both).is_ok());
    let error = source.load(FILE, DType::F32, &Device::Cpu, |w| w.get(2, "c", Init::Zeros)).unwrap_err();
    assert!(error.message.ends_with("c: missing"), "{error}");
    for hostile in ["../one", "/etc/passwd", "x/one", "", ".", "..", r"x\\one"] {
        index(&format!(r#"{{"a":"{hostile}"}}"#)).unwrap();
        let error = load_a(&source).unwrap_err();
        assert!(error.message.contains("not a plain file beside it"), "{hostile}: {error}");
    }
    index(r#"{"a":"one","b":"three","c":"four"}"#).unwrap();
    let error = load_a(&source).unwrap_err();
    assert!(error.message.starts_with("2 of 3 shards are missing: ") && error.hint.is_some(), "{error}");
    index("{}").unwrap();
    assert!(load_a(&source).unwrap_err().message.contains("names no files"));
    std::fs::write(path(&format!("{FILE}.index.json")), "[]").unwrap();
    assert!(load_a(&source).unwrap_err().message.contains("is not an index"));
}
