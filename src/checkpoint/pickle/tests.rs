use candle_core::{DType, Device};
use tempfile::TempDir;

use super::read;
use crate::checkpoint::{Init, Source};
use crate::error::Kind;

const FILE: &str = "model.safetensors";

/// Tensors of every kind that `torch.save` writes, beside things that are none, in `model` of a training checkpoint.
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

#[test]
fn hostile_pickles_build_nothing() {
    let zip = |pickle: &[u8]| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let stored = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        for (name, bytes) in [("x/data.pkl", pickle), ("x/data/0", &[0; 8])] {
            zip.start_file(name, stored).unwrap();
            std::io::Write::write_all(&mut zip, bytes).unwrap();
        }
        read("x.pt", zip.finish().unwrap()).unwrap_err().message
    };
    // A tensor in a storage of two floats, at an offset and of a shape with its strides, under the key "a".
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
    let tensor = |offset: &[u8], size: &[u8]| shaped(offset, &[size, b"\x85K\x01\x85"].concat());
    let many = [b"(", &b"K\x01".repeat(9)[..], b"t"].concat();
    let cases: [(&str, Vec<u8>, &str); 10] = [
        ("empty", vec![], "ends in the middle"),
        ("calls a shell", b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.".to_vec(), "holds no tensors"),
        ("deep", [&b"\x80\x02)"[..], &[0x85; 1_000_000], b"."].concat(), "holds no tensors"),
        ("pops below a mark", b"\x80\x02N(0.".to_vec(), "too few values"),
        ("a length past the end", b"\x80\x02X\xff\xff\xff\xffa.".to_vec(), "ends in the middle"),
        ("unknown instruction", b"\x80\x02\xfe.".to_vec(), "0xfe has no place"),
        ("outside the storage", tensor(b"K\x01", b"K\x02"), "outside a storage of 8 bytes"),
        ("huge", tensor(b"K\x00", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"), "overflows"),
        ("many dimensions", shaped(b"K\x00", &many.repeat(2)), "9 dimensions"),
        ("negative", tensor(b"J\xff\xff\xff\xff", b"K\x02"), "negative size"),
    ];
    for (case, pickle, part) in cases {
        let message = zip(&pickle);
        assert!(message.contains(part), "{case}: {message}");
    }
}
