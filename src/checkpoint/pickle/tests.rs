use candle_core::{DType, Device};
use tempfile::TempDir;

use super::read;
use crate::checkpoint::header::Stored;
use crate::checkpoint::{Init, Source};
use crate::error::Kind;

const FILE: &str = "model.safetensors";

/// Tensors of every kind that `torch.save` writes, beside things that are none, in `model` of a
/// training checkpoint.
const PYTORCH: &[u8] = include_bytes!("../../../tests/data/checkpoint.pt");

#[test]
fn pytorch_checkpoints_are_read() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("model.pt"), PYTORCH).unwrap();
    let source = Source::Folder(dir.path().into());
    let get = |shape: &[usize], key: &str| {
        let tensor = source.load(FILE, DType::F32, &Device::Cpu, |w| w.get(shape, key, Init::Zeros));
        tensor.map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
    };
    assert_eq!(get(&[2, 3], "a").unwrap(), [1.5, -2.0, 3.0, 0.25, 8.0, -1.0]);
    assert_eq!(get(&[2], "b").unwrap(), [0.5, -4.0]);
    assert_eq!(get(&[2, 1], "c").unwrap(), [2.0, 1.0]);
    assert_eq!(get(&[4], "row").unwrap(), [4.0, 5.0, 6.0, 7.0]);
    assert_eq!(get(&[1], "weight").unwrap(), [7.0]);
    assert!(get(&[], "count").unwrap_err().message.contains("count: stored as I64"));
    assert!(get(&[3, 2], "a").unwrap_err().message.contains("a: found (2, 3), expected (3, 2)"));
    std::fs::write(dir.path().join("model.pt"), include_bytes!("../../../tests/data/transposed.pt")).unwrap();
    assert!(get(&[4, 3], "t").unwrap_err().message.contains("not contiguous"));
}

#[test]
fn every_prefix_and_every_changed_byte_of_a_pytorch_checkpoint_is_an_error_or_a_checkpoint() {
    let mut broken = 0;
    for end in 0..PYTORCH.len() {
        assert!(read("x.pt", std::io::Cursor::new(&PYTORCH[..end])).is_err(), "cut at {end}");
    }
    for at in 0..PYTORCH.len() {
        for change in [1u8, 0x80, 0xff] {
            let mut bytes = PYTORCH.to_vec();
            bytes[at] ^= change;
            match read("x.pt", std::io::Cursor::new(&bytes)) {
                Ok(header) => assert!(header.values().all(|e| e.start + e.length <= bytes.len() as u64)),
                Err(e) => {
                    assert_eq!(e.kind, Kind::Model);
                    broken += 1;
                }
            }
        }
    }
    assert!(broken > 1000, "{broken}");
}

/// Infinity's public files have tensors with attributes, and training dumps with the weights in one
/// of several dictionaries.
#[test]
fn infinitys_files_are_read_whole() {
    let expected = include_bytes!("../../../tests/data/infinity/pickle_expected.safetensors");
    let expected = safetensors::SafeTensors::deserialize(expected).unwrap();
    for (prefix, file, tensors) in [
        ("attributes.", &include_bytes!("../../../tests/data/infinity/pickle_tensor_with_attributes.pth")[..], 6),
        ("dump.", include_bytes!("../../../tests/data/infinity/pickle_training_dump.pth"), 3),
    ] {
        let header = read("x.pth", std::io::Cursor::new(file)).unwrap();
        let wanted =
            expected.tensors().into_iter().filter_map(|(key, t)| Some((key.strip_prefix(prefix)?.to_string(), t)));
        let wanted: Vec<_> = wanted.collect();
        assert_eq!((header.len(), wanted.len()), (tensors, tensors), "{:?}", header.keys());
        for (key, tensor) in wanted {
            let entry = &header[&key];
            let data = &file[entry.start as usize..][..entry.length as usize];
            assert_eq!((entry.stored, &entry.shape[..]), (Stored::Plain(tensor.dtype()), tensor.shape()), "{key}");
            assert!(data == tensor.data(), "{key}");
        }
    }
}

/// An archive of a pickle and one storage of 8 bytes.
fn archive(pickle: &[u8]) -> std::io::Cursor<Vec<u8>> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", &[0; 8])] {
        zip.start_file(name, stored).unwrap();
        std::io::Write::write_all(&mut zip, bytes).unwrap();
    }
    zip.finish().unwrap()
}

/// Instructions for a text of less than 256 bytes.
fn text(text: &str) -> Vec<u8> {
    [&[b'X', text.len() as u8, 0, 0, 0], text.as_bytes()].concat()
}

/// Instructions for a float tensor of one element.
fn tensor() -> Vec<u8> {
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n",
        &b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\x00K\x01\x85K\x01\x85\x89}tR"[..],
    ]
    .concat()
}

/// Instructions for a dictionary.
fn dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let entries = entries.iter().flat_map(|(key, value)| [text(key), value.clone()].concat());
    [&b"}("[..], &entries.collect::<Vec<u8>>(), b"u"].concat()
}

#[test]
fn the_weights_are_the_named_or_the_only_dictionary_of_tensors() {
    let keys = |root: &[(&str, Vec<u8>)]| {
        let pickle = [&b"\x80\x02"[..], &dict(root), b"."].concat();
        let header = read("x.pt", archive(&pickle)).map_err(|e| e.message)?;
        Ok::<_, String>(header.into_keys().collect::<Vec<_>>().join(" "))
    };
    let none = || b"N".to_vec();
    let opaque = || b"cnumpy\nscalar\n)R".to_vec();
    let [a, b, c] = ["a", "b", "c"].map(|key| dict(&[(key, tensor()), ("steps", b"K\x07".to_vec())]));
    assert_eq!(keys(&[("x", tensor()), ("y", tensor()), ("none", none())]).unwrap(), "x y");
    assert_eq!(keys(&[("discriminator", a.clone()), ("vae", b.clone()), ("step", none())]).unwrap(), "b");
    assert_eq!(keys(&[("ema", none()), ("vae", b.clone()), ("model", c.clone()), ("args", opaque())]).unwrap(), "c");
    let nested = dict(&[("gpt_fsdp", c.clone()), ("gpt_fsdp_opt", opaque())]);
    assert_eq!(keys(&[("trainer", nested), ("args", opaque()), ("epoch", none())]).unwrap(), "c");
    assert_eq!(keys(&[("params", c.clone()), ("args", opaque()), ("epoch", none())]).unwrap(), "c");
    for (root, part) in [
        (vec![("one", a.clone()), ("two", b.clone())], r#"several places, "one" and "two""#),
        (vec![("x", tensor()), ("y", opaque())], r#"cannot be read: "y""#),
        (vec![("x", tensor()), ("list", [&b"]"[..], &tensor(), b"a"].concat())], r#"cannot be read: "list""#),
        (vec![("x", tensor()), ("pair", [&b"K\x01"[..], &tensor(), b"\x86"].concat())], r#"cannot be read: "pair""#),
        (vec![("x", tensor()), ("inner", a.clone())], r#"cannot be read: "inner""#),
        (vec![("model", dict(&[("x", tensor()), ("y", opaque())]))], r#"cannot be read: "y""#),
        (vec![("params", dict(&[("x", opaque())]))], "holds no tensors"),
        (vec![("x", tensor()), ("x", tensor())], "twice"),
    ] {
        let error = keys(&root).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn hostile_pickles_build_nothing() {
    let zip = |pickle: &[u8]| read("x.pt", archive(pickle)).unwrap_err().message;
    // A tensor in a storage of two floats, at an offset and of a shape with its strides, under the
    // key "a".
    let shaped = |offset: &[u8], shape: &[u8]| {
        let parts: [&[u8]; 7] = [
            b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n",
            b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ",
            offset,
            shape,
            b"\x89}tR",
            b"s",
            b".",
        ];
        parts.concat()
    };
    let sized = |offset: &[u8], size: &[u8]| shaped(offset, &[size, b"\x85K\x01\x85"].concat());
    let many = [b"(", &b"K\x01".repeat(9)[..], b"t"].concat();
    let many_times = |part: &[u8]| [b"\x80\x02", &part.repeat((10 << 20) / part.len())[..], b"."].concat();
    let flood = |part: &[u8]| [&b"\x80\x02"[..], &text("a"), b"\x94", &many_times(part)[2..]].concat();
    let cases: [(&str, Vec<u8>, &str); 21] = [
        ("empty", vec![], "ends in the middle"),
        ("calls a shell", b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.".to_vec(), "holds no tensors"),
        ("deep", [&b"\x80\x02)"[..], &[0x85; 1_000_000], b"."].concat(), "holds no tensors"),
        ("pops below a mark", b"\x80\x02N(0.".to_vec(), "too few values"),
        ("a length past the end", b"\x80\x02X\xff\xff\xff\xffa.".to_vec(), "ends in the middle"),
        ("unknown instruction", b"\x80\x02\xfe.".to_vec(), "0xfe has no place"),
        ("outside the storage", sized(b"K\x01", b"K\x02"), "outside a storage of 8 bytes"),
        ("huge", sized(b"K\x00", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"), "overflows"),
        ("many dimensions", shaped(b"K\x00", &many.repeat(2)), "9 dimensions"),
        ("empty tuples", many_times(b")"), "more than 1048576 instructions"),
        ("nested tuples", [&b"\x80\x02)"[..], &[0x85; 10 << 20], b"."].concat(), "more than 1048576 instructions"),
        ("empty lists", many_times(b"]"), "more than 1048576 instructions"),
        ("nested lists", [&b"\x80\x02"[..], &b"]".repeat(500_000), &b"a".repeat(499_999), b"."].concat(), "no tensors"),
        ("dictionaries", many_times(b"}NNs"), "more than 1048576 instructions"),
        (
            "nested dictionaries",
            [&b"\x80\x02"[..], &b"}K\x01".repeat(300_000), b"N", &b"s".repeat(300_000), b"."].concat(),
            "no tensors",
        ),
        ("marks", many_times(b"("), "more than 1048576 instructions"),
        ("memo", flood(b"\x94"), "more than 1048576 instructions"),
        ("the same again", flood(b"h\0"), "more than 1048576 instructions"),
        ("names", many_times(b"ca\nb\n"), "more than 1048576 instructions"),
        ("a pickle of 17 MB", vec![b'N'; 17 << 20], "more than 16777216"),
        ("negative", sized(b"J\xff\xff\xff\xff", b"K\x02"), "negative size"),
    ];
    for (case, pickle, part) in cases {
        let message = zip(&pickle);
        assert!(message.contains(part), "{case}: {message}");
    }
}
