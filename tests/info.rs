//! What `nextflow info` tells of files of weights, and what is refused by their headers alone.

use std::path::Path;
use std::process::{Command, Output};

fn nextflow(folder: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).current_dir(folder).env_remove("NEXTFLOW_MODEL").env_remove("NEXTFLOW_DEVICE");
    command.output().unwrap()
}

#[track_caller]
fn works(folder: &Path, args: &[&str]) -> Vec<u8> {
    let output = nextflow(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A safetensors file of nothing but a header: the tensors of a list of keys and dimensions, whose data is a hole.
fn header_only(path: &Path, list: &str, change: impl Fn(&str) -> Option<Vec<u64>>) {
    let (mut entries, mut end) = (Vec::new(), 0);
    for line in list.lines() {
        let mut words = line.split(' ');
        let key = words.next().unwrap();
        let Some(shape) = change(key) else { continue };
        let shape = if shape.is_empty() { words.map(|d| d.parse().unwrap()).collect() } else { shape };
        let bytes = 4 * shape.iter().product::<u64>();
        entries.push(format!(r#""{key}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{end},{}]}}"#, end + bytes));
        end += bytes;
    }
    let header = format!("{{{}}}", entries.join(","));
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(path, &bytes).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().set_len(bytes.len() as u64 + end).unwrap();
}

#[test]
fn the_public_tokenizers_are_known_by_their_keys() {
    let dir = tempfile::tempdir().unwrap();
    let (here, file) = (dir.path(), dir.path().join("t.safetensors"));
    for (name, list, count) in [
        ("clipb_32k_enhanced", include_str!("data/tokenflow/tok_clipb_32k_enhanced.keys.txt"), 649),
        ("siglip_32k", include_str!("data/tokenflow/tok_siglip_32k.keys.txt"), 848),
    ] {
        header_only(&file, list, |_| Some(vec![]));
        let info: serde_json::Value =
            serde_json::from_slice(&works(here, &["info", "t.safetensors", "--json"])).unwrap();
        assert_eq!(info["family"], format!("TokenFlow image tokenizer {name}"));
        assert_eq!(info["files"][0]["tensors"], count);
        let empty = serde_json::json!([]);
        assert_eq!(
            (&info["fit"]["missing"], &info["fit"]["misshapen"], &info["fit"]["unknown"]),
            (&empty, &empty, &empty)
        );
        // One wrong shape, one tensor short: refused by name, before anything large is read.
        header_only(&file, list, |key| match key {
            "quant_conv.weight" => Some(vec![8, 255, 1, 1]),
            "post_quant_conv.bias" => None,
            _ => Some(vec![]),
        });
        image::RgbImage::new(300, 200).save(here.join("in.png")).unwrap();
        let output = nextflow(here, &["encode", "in.png", "--model", "t.safetensors"]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(3), "{stderr}");
        for part in [
            name,
            "1 missing, 1 wrongly shaped",
            "quant_conv.weight: found (8, 255, 1, 1), expected (8, 256, 1, 1)",
            "post_quant_conv.bias: missing",
        ] {
            assert!(stderr.contains(part), "{part}: {stderr}");
        }
    }
    let text = String::from_utf8(works(here, &["info"])).unwrap();
    assert!(text.starts_with("NextFlow model nano\n") && text.ends_with("  complete\n"), "{text}");
}
