//! Which files are downloaded, and what a model may be called.

use std::path::Path;

use crate::fake::*;

/// What is in the snapshot after `models pull o/m`, or the error.
fn taken(files: &[(&str, &str)], args: &[&str]) -> Result<Vec<String>, String> {
    let home = tempfile::tempdir().unwrap();
    let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect();
    let hub = Hub::serve(model("o/m", &files));
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &[&["models", "pull", "o/m"], args].concat());
    if code != 0 {
        assert_eq!(code, 3, "{stderr}");
        assert!(stderr.contains("hint: ") && stdout.is_empty(), "{stderr}");
        assert_eq!(hub.requests("/resolve/").len(), 0, "a refusal comes before a download: {stderr}");
        return Err(stderr);
    }
    let mut names = Vec::new();
    let root = Path::new(stdout.trim_end());
    let mut rest = vec![root.to_path_buf()];
    while let Some(folder) = rest.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                rest.push(path);
            } else {
                names.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_string());
            }
        }
    }
    names.sort();
    Ok(names)
}

const SMALL: [(&str, &str); 8] = [
    ("config.json", "{}"),
    ("generation_config.json", "{} "),
    ("preprocessor_config.json", "{}  "),
    ("tokenizer.json", "{}   "),
    ("tokenizer_config.json", "{}    "),
    ("chat_template.jinja", "x"),
    ("README.md", "r"),
    (".gitattributes", "g"),
];

fn with_small(files: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    [&SMALL[..], files].concat()
}

#[test]
fn only_what_the_program_opens_is_downloaded() {
    let small = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    let with = |more: &[&str]| {
        let mut all: Vec<String> = small.iter().chain(more).map(|n| n.to_string()).collect();
        all.sort();
        Ok(all)
    };
    let junk = [
        ("model.onnx", "1"),
        ("onnx/model.onnx", "2"),
        ("pytorch_model.bin", "3"),
        ("optimizer.pt", "4"),
        ("rng_state.pth", "5"),
        ("training_args.bin", "6"),
        ("tf_model.h5", "7"),
        ("flax_model.msgpack", "8"),
        ("trainer_state.json", "9"),
        ("checkpoint-500/model.safetensors", "10"),
        ("model-Q4_K_M.gguf", "11"),
        ("pytorch_model.bin.index.json", "12"),
        ("runs/events.out", "13"),
        ("consolidated.safetensors", "14"),
        ("original/consolidated.00.pth", "15"),
        ("model.pt", "16"),
        ("scheduler.pt", "17"),
        ("model.gguf", "18"),
    ];
    let among = |files: &[(&'static str, &'static str)]| with_small(&[files, &junk].concat());
    assert_eq!(taken(&among(&[("model.safetensors", "w")]), &[]), with(&["model.safetensors"]));
    let index = r#"{"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}"#;
    let shards = [
        ("model.safetensors.index.json", index),
        ("model-1-of-2.safetensors", "a"),
        ("model-2-of-2.safetensors", "b"),
        ("image_tokenizer.safetensors", "i"),
    ];
    assert_eq!(taken(&among(&shards), &[]), with(&shards.map(|(name, _)| name)));
    // The first of what the program looks for is what it would open.
    assert_eq!(taken(&with_small(&junk), &[]), with(&["model.gguf"]));
    assert_eq!(taken(&with_small(&[("only.pth", "p"), junk[3], junk[4]]), &[]), with(&["only.pth"]));
    assert_eq!(taken(&with_small(&junk[..12]), &[]), with(&["pytorch_model.bin"]));
    let uncounted = [("model-00001-of-00002.safetensors", "a"), ("model-00002-of-00002.safetensors", "b")];
    assert_eq!(taken(&among(&uncounted), &[]), with(&uncounted.map(|(name, _)| name)));
    let public = [("model.safetensors", "w"), ("tokenflow_clipb_32k_enhanced.pt", "t")];
    assert_eq!(taken(&with_small(&public), &[]), with(&public.map(|(name, _)| name)));
}

#[test]
fn a_choice_is_left_to_the_user() {
    let quants = with_small(&[
        ("m-Q2_K.gguf", "22"),
        ("m-Q4_K_M.gguf", "4444"),
        ("m-f16.gguf", "16161616"),
        ("mmproj.gguf", "m"),
    ]);
    let e = taken(&quants, &[]).unwrap_err();
    assert!(e.contains("several GGUF files") && e.contains("m-Q2_K.gguf (2 B), m-Q4_K_M.gguf (4 B)"), "{e}");
    assert!(e.contains("hint: nextflow models pull o/m m-Q2_K.gguf downloads one"), "{e}");
    let names = taken(&quants, &["m-Q4_K_M.gguf"]).unwrap();
    assert!(
        names.contains(&"m-Q4_K_M.gguf".into()) && names.contains(&"config.json".into()) && names.len() == 7,
        "{names:?}"
    );
    assert!(taken(&quants, &["m-Q9.gguf"]).unwrap_err().contains("has no file m-Q9.gguf; there are m-Q2_K.gguf"));
    let two = [("tokenflow_siglip_32k.pt", "a"), ("tokenflow_clipb_32k_enhanced.pt", "b")];
    assert!(taken(&two, &[]).unwrap_err().contains("several files of weights"));
    assert_eq!(taken(&two, &["tokenflow_siglip_32k.pt"]).unwrap(), ["tokenflow_siglip_32k.pt"]);
    // A pasted address of a file is a choice as well.
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model("o/m", &[("a.gguf", vec![1]), ("b.gguf", vec![2])]));
    let (code, stdout, stderr) =
        nextflow(home.path(), &hub, &["models", "pull", "https://huggingface.co/o/m/blob/main/b.gguf"]);
    assert!(code == 0 && Path::new(stdout.trim_end()).join("b.gguf").exists(), "{stderr}");
    assert!(hub.requests("a.gguf").is_empty());
}

#[test]
fn a_repository_without_weights_is_refused() {
    for (files, said) in [
        (&[][..], "o/m has no weights\n"),
        (&[("tf_model.h5", "w"), ("model.ckpt", "w2")], "no weights that are read here"),
        (&[("adapter_model.safetensors", "l"), ("adapter_config.json", "{}")], "only a LoRA adapter"),
        (&[("optimizer.pt", "o")], "has no weights"),
        (&[("transformer/model.safetensors", "t"), ("vae/model.safetensors", "v")], "only in folders: transformer/"),
        (&[("m-Q4_K_M.gguf", "4444")], "only a GGUF file, and none called model.gguf"),
    ] {
        let e = taken(&with_small(files), &[]).unwrap_err();
        assert!(e.contains(said), "{said}: {e}");
    }
    // An index that promises what is not there, or what is none of its business.
    for (index, said) in [
        (r#"{"weight_map": {"a": "gone.safetensors"}}"#, "which is not there"),
        (r#"{"weight_map": {"a": "../../x"}}"#, "which is not there"),
        (r#"{"weight_map": {}}"#, "names no files"),
        ("[]", "is no index"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let hub = Hub::serve(model(
            "o/m",
            &[("model.safetensors.index.json", index.into()), ("config.json", b"{}".to_vec())],
        ));
        let (code, _, stderr) = pull(home.path(), &hub);
        assert!(code == 3 && stderr.contains(said), "{stderr}");
    }
}

#[test]
fn a_revision_may_have_slashes() {
    let home = tempfile::tempdir().unwrap();
    let list = listing(&usual().map(|(name, bytes)| sibling(name, &bytes)));
    let hub = Hub::serve(model("o/m", &usual()));
    hub.add(answers([
        ("/api/models/o/m/revision/refs%2Fpr%2F1?blobs=true".to_string(), list.clone()),
        (format!("/api/models/o/m/revision/{COMMIT}?blobs=true"), list),
    ]));
    for name in ["o/m@refs/pr/1", "https://huggingface.co/o/m/tree/refs%2Fpr%2F1"] {
        pulled(&mut command(home.path(), &hub, &["models", "pull", name]));
    }
    let refs = home.path().join("hub/models--o--m/refs");
    assert_eq!(std::fs::read_to_string(refs.join("refs/pr/1")).unwrap(), COMMIT);
    // A commit needs no name of its own.
    pulled(&mut command(home.path(), &hub, &["models", "pull", &format!("o/m@{COMMIT}")]));
    assert_eq!(std::fs::read_dir(refs).unwrap().count(), 1);
}

#[test]
fn a_pasted_address_is_a_name() {
    let hub = Hub::serve(model("o/m", &usual()));
    let own = format!("{}/o/m/tree/main", hub.endpoint);
    for name in ["https://huggingface.co/o/m", "https://hf.co/o/m/", "huggingface.co/o/m/tree/main", "hf://o/m", &own] {
        let home = tempfile::tempdir().unwrap();
        pulled(&mut command(home.path(), &hub, &["models", "pull", name]));
        let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "verify", name]);
        assert_eq!(code, 0, "{stderr}");
        let (code, _, stderr) = nextflow(home.path(), &hub, &["info", "--model", name, "--offline"]);
        assert!(code != 2 || !stderr.contains("is not the name"), "{stderr}");
    }
    let home = tempfile::tempdir().unwrap();
    for (name, said) in [
        ("https://example.org/o/m", "hint: HF_ENDPOINT=https://example.org nextflow models pull OWNER/NAME"),
        ("https://huggingface.co/datasets/o/m", "is a dataset, not a model"),
        ("https://huggingface.co/o", "is not the name of a model"),
        ("o/m@../x", "is not the name of a model"),
    ] {
        for args in [&["models", "pull", name][..], &["models", "rm", name]] {
            let (code, _, stderr) = nextflow(home.path(), &hub, args);
            assert!(code == 2 && stderr.contains(said), "{stderr}");
        }
    }
    // The same where a command takes a model.
    let (code, _, stderr) = nextflow(home.path(), &hub, &["gen", "-p", "x", "--model", "https://example.org/o/m"]);
    assert!(code == 2 && stderr.contains("example.org is not the hub"), "{stderr}");
    let mut command = command(home.path(), &hub, &["gen", "-p", "x", "--model", "o/m"]);
    std::fs::create_dir(home.path().join("o")).unwrap();
    let (code, _, stderr) = run(command.current_dir(home.path()));
    assert!(
        code == 3 && stderr.contains("the folder o has no model o/m") && stderr.contains("--model hf://o/m"),
        "{stderr}"
    );
}

/// Infinity's repository holds models of all sizes; one is chosen by name, and its text encoder
/// comes from another repository.
#[test]
fn one_of_infinitys_models_is_chosen_with_what_it_needs() {
    const ID: &str = "FoundationVision/Infinity";
    let named = |names: &[&'static str]| names.iter().map(|name| (*name, name.as_bytes().to_vec())).collect::<Vec<_>>();
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model(
        ID,
        &named(&[
            "config.json",
            "infinity_125M_256x256.pth",
            "infinity_2b_reg.pth",
            "infinity_vae_d16.pth",
            "infinity_vae_d32.pth",
            "infinity_vae_d32reg.pth",
        ]),
    ));
    let index = r#"{"weight_map": {"shared.weight": "one.safetensors", "encoder.block.0.x": "one.safetensors",
        "decoder.block.0.x": "two.safetensors"}}"#;
    let mut text = named(&["config.json", "tokenizer.json", "one.safetensors", "two.safetensors", "pytorch_model.bin"]);
    text.push(("model.safetensors.index.json", index.into()));
    hub.add(model("google/flan-t5-xl", &text));
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", ID]);
    assert!(code == 2 && ["125m", "2b", "8b", "8b-512"].iter().all(|name| stderr.contains(name)), "{code}: {stderr}");
    assert_eq!(hub.requests("/resolve/").len(), 0, "a choice comes before a download");
    let (code, _, stderr) = nextflow(home.path(), &hub, &["models", "pull", &format!("{ID}:125m")]);
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("11.5 GB in all"), "the size is told first: {stderr}");
    for (file, times) in [
        ("infinity_125M_256x256.pth", 1),
        ("infinity_vae_d16.pth", 1),
        ("infinity_2b_reg.pth", 0),
        ("infinity_vae_d32", 0),
        ("one.safetensors", 1),
        ("two.safetensors", 0),
        ("pytorch_model.bin", 0),
    ] {
        assert_eq!(
            hub.requests(file).iter().filter(|r| r.path.contains("/resolve/")).count(),
            times,
            "{file}: {stderr}"
        );
    }
}

/// OneCAT's repository has no image tokenizer; Infinity's does, and only that file of it is
/// downloaded.
#[test]
fn onecats_image_tokenizer_comes_from_infinitys_repository() {
    const ID: &str = "onecat-ai/OneCAT-3B";
    let home = tempfile::tempdir().unwrap();
    let named = |names: &[&'static str]| names.iter().map(|name| (*name, name.as_bytes().to_vec())).collect::<Vec<_>>();
    let mut files = named(&["model.safetensors", "tokenizer.json", "generation_config.json"]);
    files.push(("config.json", br#"{"model_type": "onecat"}"#.to_vec()));
    let hub = Hub::serve(model(ID, &files));
    hub.add(model("FoundationVision/Infinity", &named(&["infinity_2b_reg.pth", "infinity_vae_d32reg.pth"])));
    let downloads = |file: &str| {
        let of = |path: &str| path.contains("/resolve/") && path.ends_with(&format!("/{file}"));
        hub.requests(file).iter().filter(|request| of(&request.path)).count()
    };
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", ID]);
    assert_eq!(code, 0, "{stderr}");
    let folder = Path::new(stdout.trim_end());
    for name in ["config.json", "model.safetensors", "tokenizer.json", "infinity_vae_d32reg.pth"] {
        assert!(folder.join(name).exists(), "{name}: {stderr}");
        assert_eq!(downloads(name), 1, "{name}");
    }
    assert_eq!(downloads("infinity_2b_reg.pth"), 0);
    // Nothing is downloaded twice.
    let (code, again, stderr) = nextflow(home.path(), &hub, &["models", "pull", ID]);
    assert!(code == 0 && again == stdout, "{stderr}");
    assert_eq!(downloads("infinity_vae_d32reg.pth"), 1);
}

/// A pipeline in the layout of diffusers: the files of its folders that Z-Image reads.
#[cfg(feature = "nano")]
#[test]
fn a_refiner_comes_in_folders() {
    const ID: &str = "Tongyi-MAI/Z-Image-Turbo";
    let named = |names: &[&'static str]| names.iter().map(|name| (*name, name.as_bytes().to_vec())).collect::<Vec<_>>();
    let mut files = named(&[
        "README.md",
        "assets/showcase.jpg",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/generation_config.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]);
    files.push(("model_index.json", br#"{"_class_name": "ZImagePipeline"}"#.to_vec()));
    let index =
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
    files.push(("text_encoder/model.safetensors.index.json", index.to_vec()));
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(model(ID, &files));
    hub.add(model("o/flux", &[("model_index.json", br#"{"_class_name": "FluxPipeline"}"#.to_vec())]));
    // What would be downloaded is listed, and is not.
    let dry = ["gen", "x", "--refiner", ID, "--dry-run"];
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &dry);
    assert!(code == 0 && stdout.contains("11 files to download"), "{stdout}{stderr}");
    assert!(stdout.contains("text_encoder/model-00002-of-00002.safetensors"), "{stdout}");
    assert_eq!(hub.requests("/resolve/").len(), 0, "{stderr}");
    let (code, stdout, stderr) = nextflow(home.path(), &hub, &["models", "pull", ID]);
    assert_eq!(code, 0, "{stderr}");
    let folder = Path::new(stdout.trim_end());
    for (name, bytes) in &files {
        let there = std::fs::read(folder.join(name)).is_ok_and(|found| found == *bytes);
        let wanted = !["README.md", "assets/", "generation_config", "merges"].iter().any(|part| name.contains(part));
        assert_eq!(there, wanted, "{name}: {stderr}");
    }
    // Another pipeline is refused by its smallest file, and offline nothing is asked for.
    let (code, _, stderr) = nextflow(home.path(), &hub, &["gen", "x", "--refiner", "o/flux", "-o", "x.png"]);
    assert!(code == 3 && stderr.contains("names \"FluxPipeline\""), "{stderr}");
    let asked = hub.requests("").len();
    let (code, _, stderr) =
        nextflow(home.path(), &hub, &["gen", "x", "--refiner", "o/none", "--offline", "-o", "x.png"]);
    assert!(code == 3 && stderr.contains("is not in the cache"), "{stderr}");
    assert_eq!(hub.requests("").len(), asked);
}
