//! What `nextflow info` tells of files of weights, and what is refused by their headers alone.

mod common;

use std::path::Path;
use std::process::Output;

fn nextflow(folder: &Path, args: &[&str]) -> Output {
    common::command(folder, args).output().unwrap()
}

#[track_caller]
fn works(folder: &Path, args: &[&str]) -> Vec<u8> {
    let output = nextflow(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A safetensors file of nothing but a header: the tensors of a list of keys and dimensions, whose
/// data is a hole.
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

/// Every key of a list in which `N a.*.b SHAPE` stands for N layers, as lines of one key each.
fn spelt(list: &str) -> Vec<String> {
    let all = list.lines().flat_map(|line| {
        let (count, rest) = line.split_once(' ').unwrap();
        (0..count.parse::<usize>().unwrap()).map(move |i| rest.replacen(".*.", &format!(".{i}."), 1))
    });
    all.collect()
}

#[test]
fn qwens_public_checkpoints_are_complete_and_nothing_in_them_is_unknown() {
    let tiny: serde_json::Value = serde_json::from_str(include_str!("data/qwen/tiny/config.json")).unwrap();
    for (list, tensors, shape, eyes, layers) in [
        (include_str!("data/qwen/keys_3b.txt"), 824, [2048, 11008, 16, 2, 151_936], 3420, 36),
        (include_str!("data/qwen/keys_7b.txt"), 729, [3584, 18944, 28, 4, 152_064], 3420, 28),
        (include_str!("data/qwen/keys_72b.txt"), 1353, [8192, 29568, 64, 8, 152_064], 3456, 80),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let [hidden, inner, heads, kv, words] = shape;
        let mut config = tiny.clone();
        for (key, value) in [
            ("hidden_size", hidden),
            ("intermediate_size", inner),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv),
            ("vocab_size", words),
            ("num_hidden_layers", layers),
        ] {
            config[key] = value.into();
        }
        config["tie_word_embeddings"] = (tensors == 824).into();
        config["rope_scaling"]["mrope_section"] = serde_json::json!([16, 24, 24]);
        let eyes = [("depth", 32), ("hidden_size", 1280), ("intermediate_size", eyes), ("num_heads", 16)];
        eyes.iter().for_each(|&(key, value)| config["vision_config"][key] = value.into());
        config["vision_config"]["out_hidden_size"] = hidden.into();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        // In shards, as they are published.
        let keys = spelt(list);
        let mut map = serde_json::Map::new();
        for (i, part) in keys.chunks(500).enumerate() {
            let name = format!("model-{i}.safetensors");
            header_only(&dir.path().join(&name), &part.join("\n"), |_| Some(vec![]));
            part.iter().for_each(|line| drop(map.insert(line.split(' ').next().unwrap().into(), name.clone().into())));
        }
        let index = serde_json::json!({ "weight_map": map });
        std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let info: serde_json::Value = serde_json::from_slice(&works(dir.path(), &["info", ".", "--json"])).unwrap();
        assert_eq!(info["family"], "Qwen2.5-VL");
        let found: u64 = info["files"].as_array().unwrap().iter().map(|f| f["tensors"].as_u64().unwrap()).sum();
        assert_eq!((found, map.len()), (tensors, tensors as usize));
        for what in ["missing", "misshapen", "unknown"] {
            assert_eq!(info["fit"][what], serde_json::json!([]), "{what}");
        }
    }
}

#[test]
fn a_folder_without_weights_or_with_a_broken_config_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for (config, part) in [(None, "holds no weights"), (Some("{"), "is not JSON")] {
        if let Some(config) = config {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
        }
        let output = nextflow(dir.path(), &["info", "."]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(3) && stderr.contains(part) && stderr.contains("hint: "), "{stderr}");
    }
}
