//! Qwen2.5-VL folders as transformers 4.49 to 5.24 and other programs write them. Expected tokens
//! are greedy ones of transformers 5.24 in f32 on the same folders (tests/data/qwen/README.md).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nextflow::text::Text;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

const QUESTION: &str = "what is this";
/// What is said to the folder as it is, after `wide.png`, and the same without an image to the
/// message "no".
const USUAL: [u32; 24] =
    [19, 158, 28, 116, 255, 5, 277, 252, 143, 60, 100, 91, 104, 110, 274, 158, 275, 101, 158, 158, 112, 3, 22, 137];
const TIED: [u32; 24] = [
    200, 113, 124, 125, 38, 206, 124, 125, 168, 168, 168, 168, 30, 236, 270, 168, 238, 151, 231, 56, 248, 49, 168, 238,
];
const SMALLER: [u32; 24] =
    [51, 137, 147, 48, 225, 53, 1, 101, 34, 101, 3, 192, 116, 101, 116, 263, 241, 234, 178, 242, 278, 51, 242, 240];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qwen").join(name)
}

fn nextflow(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    let command = command.args(args).current_dir(folder).env_remove("NEXTFLOW_MODEL").env_remove("NEXTFLOW_DEVICE");
    let Output { status, stdout, stderr } = command.output().unwrap();
    let utf8 = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), utf8(stdout), utf8(stderr))
}

/// A copy of the tiny checkpoint that a test changes.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        fs::create_dir(folder.path("T")).unwrap();
        for entry in fs::read_dir(data("tiny")).unwrap() {
            let entry = entry.unwrap();
            fs::write(folder.path("T").join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
        }
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path("T").join(name)
    }

    fn write(&self, name: &str, value: &Value) -> &Self {
        fs::write(self.file(name), value.to_string()).unwrap();
        self
    }

    fn remove(&self, name: &str) -> &Self {
        fs::remove_file(self.file(name)).unwrap();
        self
    }

    /// Changes a file of JSON.
    fn change(&self, name: &str, change: impl FnOnce(&mut Value)) -> &Self {
        let mut value = serde_json::from_slice(&fs::read(self.file(name)).unwrap()).unwrap();
        change(&mut value);
        self.write(name, &value)
    }

    /// The tensors with other names, those without one left out, in as many files with an index, or
    /// in one.
    fn rename(&self, shards: usize, name: impl Fn(&str) -> Option<String>) -> &Self {
        let bytes = fs::read(data("tiny/model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut all: Vec<(String, TensorView)> =
            tensors.tensors().into_iter().filter_map(|(key, view)| Some((name(&key)?, view))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        self.remove("model.safetensors");
        let mut map = serde_json::Map::new();
        for (i, part) in all.chunks(all.len().div_ceil(shards)).enumerate() {
            let file = match shards {
                1 => "model.safetensors".to_string(),
                n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
            };
            part.iter().for_each(|(key, _)| drop(map.insert(key.clone(), file.clone().into())));
            let views = part.iter().map(|(key, view)| (key.as_str(), view));
            fs::write(self.file(&file), safetensors::serialize(views, None).unwrap()).unwrap();
        }
        if shards > 1 {
            self.write("model.safetensors.index.json", &json!({"metadata": {}, "weight_map": map}));
        }
        self
    }

    fn chat(&self, args: &[&str]) -> (i32, String, String) {
        let greedy = ["--temperature", "0", "--repetition-penalty", "1", "--max-tokens", "24", "--json"];
        nextflow(self.0.path(), &[&["chat", "--model", "T"], args, &greedy].concat())
    }

    /// Asks about the image: the tokens of the prompt, and the answer.
    #[track_caller]
    fn ask(&self) -> (u64, String) {
        let image = data("wide.png");
        let (code, stdout, stderr) = self.chat(&["-i", image.to_str().unwrap(), QUESTION]);
        assert_eq!(code, 0, "{stderr}");
        let answer: Value = serde_json::from_str(&stdout).unwrap();
        (answer["prompt_tokens"].as_u64().unwrap(), answer["text"].as_str().unwrap().into())
    }

    /// Every command that reads the folder: the answer is these tokens, `info` finds all of it, and
    /// copies made of it answer the same.
    #[track_caller]
    fn answers(&self, prompt: u64, ids: &[u32]) {
        assert_eq!(self.ask(), (prompt, words(ids)));
        let (code, stdout, stderr) = nextflow(self.0.path(), &["info", "T"]);
        assert!(code == 0 && stdout.ends_with("  complete\n"), "{stdout}{stderr}");
    }

    #[track_caller]
    fn copies_answer(&self, ids: &[u32]) {
        let (code, _, stderr) = nextflow(self.0.path(), &["quantize", "--model", "T", "--type", "f32", "-o", "Q"]);
        assert_eq!(code, 0, "{stderr}");
        let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nano");
        let assemble = ["assemble", "--backbone", "T", "--tokenizer", nano.to_str().unwrap(), "-o", "A"];
        let (code, _, stderr) = nextflow(self.0.path(), &assemble);
        assert_eq!(code, 0, "{stderr}");
        let (code, stdout, stderr) = nextflow(self.0.path(), &["info", "A"]);
        assert!(code == 0 && stdout.ends_with("  complete\n"), "{stdout}{stderr}");
        fs::rename(self.path("T"), self.path("old")).unwrap();
        fs::rename(self.path("Q"), self.path("T")).unwrap();
        assert_eq!(self.ask().1, words(ids), "of the copy by quantize");
    }

    /// Refused by every command with this exit code and all of these words.
    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        let commands = [&["chat", "--model", "T", "hi"][..], &["quantize", "--model", "T", "-o", "Q"]];
        for command in commands {
            let (code, _, stderr) = nextflow(self.0.path(), command);
            assert_eq!(code, 3, "{command:?}: {stderr}");
            for part in parts.iter().chain(&["hint: "]) {
                assert!(stderr.contains(part), "{command:?} {part}: {stderr}");
            }
            assert!(!stderr.contains("image_tokenizer"), "{stderr}");
        }
        assert!(!self.path("Q").exists());
    }
}

fn words(ids: &[u32]) -> String {
    Text::from_bytes(&fs::read(data("tiny/tokenizer.json")).unwrap()).unwrap().decode(ids).unwrap()
}

/// The key of a state dict of transformers 4.52 and later.
fn new_key(key: &str) -> String {
    match key {
        _ if key.starts_with("visual.") => format!("model.{key}"),
        _ => key.strip_prefix("model.").map_or(key.into(), |rest| format!("model.language_model.{rest}")),
    }
}

fn without_head(key: &str) -> Option<String> {
    (key != "lm_head.weight").then(|| key.into())
}

#[test]
fn the_folder_as_it_is() {
    let folder = Folder::new();
    folder.answers(141, &USUAL);
    // Words that the tokenizer does not call special stay in the text.
    let (code, stdout, stderr) = folder.chat(&["no"]);
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(code, 0, "{stderr}");
    let text = answer["text"].as_str().unwrap();
    assert!(["<|repo_name|>", "<|fim_suffix|>", "</tool_call>"].iter().all(|word| text.contains(word)), "{text}");
    let ids =
        [41, 34, 48, 91, 276, 147, 28, 101, 95, 112, 124, 104, 274, 178, 249, 50, 157, 59, 47, 41, 60, 271, 49, 252];
    assert_eq!(text, words(&ids));
}

#[test]
fn key_names_of_every_version_are_read() {
    let folder = Folder::new();
    folder.rename(1, |key| Some(new_key(key))).answers(141, &USUAL);
    folder.copies_answer(&USUAL);
    Folder::new().rename(3, |key| Some(new_key(key))).answers(141, &USUAL);
    // The base model without its head, which is tied; and a wrapped text model.
    let bare = |key: &str| without_head(key).map(|key| key.replacen("model.", "language_model.", 1));
    Folder::new().rename(1, bare).change("config.json", |c| c["tie_word_embeddings"] = true.into()).answers(141, &TIED);
    let wrapped =
        |key: &str| Some(if key.starts_with("visual.") { key.into() } else { format!("language_model.{key}") });
    Folder::new().rename(2, wrapped).answers(141, &USUAL);
    // Both names of one tensor.
    let folder = Folder::new();
    let bytes = fs::read(data("tiny/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: HashMap<String, TensorView> = tensors.tensors().into_iter().collect();
    all.insert("model.language_model.norm.weight".into(), tensors.tensor("model.norm.weight").unwrap());
    fs::write(folder.file("model.safetensors"), safetensors::serialize(all, None).unwrap()).unwrap();
    folder.refused(&["\"model.norm.weight\" twice"]);
}

#[test]
fn configs_of_every_version_are_read() {
    for version in ["4.49", "4.51", "4.57", "5.24"] {
        let config = |kind: &str| {
            let bytes = fs::read(data(&format!("saved/{version}-{kind}.json"))).unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()
        };
        Folder::new().write("config.json", &config("plain")).answers(141, &USUAL);
        let tied = Folder::new();
        tied.write("config.json", &config("tied")).rename(1, without_head).answers(141, &TIED);
        if version == "4.57" {
            tied.copies_answer(&TIED);
        }
        // A head that is there although it is tied is another one: transformers 5 then ties
        // nothing.
        Folder::new().write("config.json", &config("tied")).answers(141, &USUAL);
    }
}

#[test]
fn rope_scaling_is_computed_or_refused_by_name() {
    let yarn =
        json!({"type": "yarn", "mrope_section": [2, 3, 3], "factor": 4, "original_max_position_embeddings": 1024});
    let ids = [
        105, 3, 22, 155, 252, 19, 4, 277, 247, 158, 101, 212, 34, 147, 193, 275, 110, 112, 192, 278, 170, 122, 22, 196,
    ];
    let folder = Folder::new();
    folder.change("config.json", |c| c["rope_scaling"] = yarn.clone()).answers(141, &ids);
    folder.copies_answer(&ids);
    // Two more, and the message "no".
    let linear = json!({"type": "linear", "mrope_section": [2, 3, 3], "factor": 3.0});
    let sharp = json!({"rope_type": "yarn", "mrope_section": [2, 3, 3], "factor": 8.0, "beta_fast": 16, "beta_slow": 2,
        "original_max_position_embeddings": 512, "attention_factor": 0.9});
    for (rope, ids) in [
        (
            linear,
            [
                86, 177, 235, 196, 196, 196, 147, 124, 124, 124, 124, 124, 242, 192, 178, 249, 249, 100, 209, 101, 74,
                5, 101, 74,
            ],
        ),
        (
            sharp,
            [
                269, 59, 269, 140, 14, 21, 186, 101, 147, 124, 124, 124, 124, 124, 3, 53, 67, 66, 3, 116, 42, 101, 192,
                43,
            ],
        ),
    ] {
        let folder = Folder::new();
        folder.change("config.json", |c| c["rope_scaling"] = rope.clone());
        let (_, stdout, stderr) = folder.chat(&["no"]);
        let answer: Value = serde_json::from_str(&stdout).expect(&stderr);
        assert_eq!(answer["text"].as_str().unwrap(), words(&ids), "{rope}");
    }
    // Both keys, as transformers 5 has written for a while; the older one wins.
    Folder::new()
        .change("config.json", |c| {
            c["rope_parameters"] = c["rope_scaling"].clone();
            c["rope_parameters"]["rope_theta"] = 1e6.into();
        })
        .answers(141, &USUAL);
    for kind in ["dynamic", "longrope", "llama3"] {
        let rope = json!({"rope_type": kind, "mrope_section": [2, 3, 3], "factor": 4.0});
        Folder::new().change("config.json", |c| c["rope_scaling"] = rope).refused(&["rope_scaling", kind]);
    }
}

#[test]
fn limits_of_pixels_are_found_in_every_place() {
    let size = json!({"shortest_edge": 3136, "longest_edge": 20000});
    let folder = Folder::new();
    folder.change("preprocessor_config.json", |c| {
        let fields = c.as_object_mut().unwrap();
        fields.remove("min_pixels");
        fields.remove("max_pixels");
        fields.insert("size".into(), size.clone());
    });
    folder.answers(95, &SMALLER);
    let own: Value = serde_json::from_slice(&fs::read(folder.file("preprocessor_config.json")).unwrap()).unwrap();
    let nested = json!({"image_processor": own, "processor_class": "Qwen2_5_VLProcessor"});
    let folder = Folder::new();
    folder.write("processor_config.json", &nested).answers(95, &SMALLER);
    folder.remove("preprocessor_config.json").answers(95, &SMALLER);
    folder.copies_answer(&SMALLER);
    let nulls = json!({"min_pixels": null, "max_pixels": 60000.0, "size": null, "patch_size": 14});
    Folder::new().write("preprocessor_config.json", &nulls).answers(141, &USUAL);
    // Neither file: said, for transformers would not load the folder.
    let folder = Folder::new();
    let (code, _, stderr) = folder.remove("preprocessor_config.json").chat(&["hi"]);
    assert!(code == 0 && stderr.contains("preprocessor_config.json"), "{stderr}");
}

#[test]
fn fields_that_are_null_or_left_out_are_the_librarys() {
    let folder = Folder::new();
    folder.change("generation_config.json", |c| {
        for key in ["eos_token_id", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty"] {
            c[key] = Value::Null;
        }
    });
    folder.answers(141, &USUAL);
    Folder::new().write("generation_config.json", &json!({})).answers(141, &USUAL);
    Folder::new().remove("generation_config.json").answers(141, &USUAL);
    let folder = Folder::new();
    folder.change("config.json", |c| {
        let vision = c["vision_config"].as_object_mut().unwrap();
        for key in ["patch_size", "spatial_merge_size", "window_size", "temporal_patch_size", "hidden_act", "in_chans"]
        {
            vision.remove(key);
        }
        c["sliding_window"] = Value::Null;
        c.as_object_mut().unwrap().remove("rope_theta");
    });
    folder.answers(141, &USUAL);
}

/// What other programs leave in a folder: settings of trainers, a video processor, tables of added
/// tokens, another vocabulary.
#[test]
fn extra_files_and_fields_of_other_programs_change_nothing() {
    let folder = Folder::new();
    folder
        .change("config.json", |c| {
            c["_attn_implementation_autoset"] = true.into();
            c["unsloth_fixed"] = true.into();
            c["unsloth_version"] = "2025.9.1".into();
            c["dtype"] = "bfloat16".into();
            c["pad_token_id"] = 256.into();
            c["rope_scaling"] = json!({"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]});
            c["quantization_config"] = Value::Null;
        })
        .write("video_preprocessor_config.json", &json!({"size": {"shortest_edge": 1, "longest_edge": 2}}))
        .write("added_tokens.json", &json!({"<tool_call>": 270}))
        .write("special_tokens_map.json", &json!({"eos_token": "<|im_end|>"}))
        .write("trainer_state.json", &json!({"epoch": 1.0}))
        .write(
            "tokenizer_config.json",
            &json!({"add_bos_token": false, "chat_template": null, "eos_token": "<|im_end|>"}),
        );
    fs::write(folder.file("training_args.bin"), b"PK").unwrap();
    fs::write(folder.file("optimizer.pt.tmp"), b"x").unwrap();
    folder.answers(141, &USUAL);
}

#[test]
fn the_folders_own_chat_template_is_used() {
    let chatml = fs::read_to_string(data("templates/chatml.jinja")).unwrap();
    let thinking = fs::read_to_string(data("templates/thinking.jinja")).unwrap();
    // The published template is what is used without one.
    let folder = Folder::new();
    folder.write("tokenizer_config.json", &json!({"chat_template": chatml})).answers(141, &USUAL);
    // Other tokens: no system prompt, and a word that opens the answer. The file of its own wins.
    fs::write(folder.file("chat_template.jinja"), &thinking).unwrap();
    let (tokens, text) = folder.ask();
    assert!(tokens < 141 && text != words(&USUAL), "{tokens} {text}");
    let named = json!([{"name": "rag", "template": "x"}, {"name": "default", "template": thinking}]);
    for (file, value) in [
        ("tokenizer_config.json", json!({"chat_template": named})),
        ("chat_template.json", json!({"chat_template": thinking})),
    ] {
        assert_eq!(Folder::new().write(file, &value).ask(), (tokens, text.clone()), "{file}");
    }
    // A copy has it too.
    let (code, _, stderr) = nextflow(folder.0.path(), &["quantize", "--model", "T", "--type", "f32", "-o", "Q"]);
    assert_eq!(code, 0, "{stderr}");
    assert!(folder.path("Q/chat_template.jinja").exists());
    // One that cannot be used is said not to be, and the usual one stands in.
    for broken in ["{% for %}", "{{ raise_exception('never') }}", "fixed words"] {
        let folder = Folder::new();
        fs::write(folder.file("chat_template.jinja"), broken).unwrap();
        let image = data("wide.png");
        let (code, stdout, stderr) = folder.chat(&["-i", image.to_str().unwrap(), QUESTION]);
        assert!(code == 0 && stderr.contains("chat_template.jinja") && stderr.contains("not used"), "{stderr}");
        assert_eq!(serde_json::from_str::<Value>(&stdout).unwrap()["text"], words(&USUAL));
    }
}

#[test]
fn what_is_not_read_is_named_with_a_way_out() {
    for (method, name) in [("awq", "AWQ"), ("gptq", "GPTQ"), ("bitsandbytes", "bitsandbytes"), ("fp8", "fp8")] {
        let encoding = json!({"quant_method": method, "bits": 4});
        Folder::new().change("config.json", |c| c["quantization_config"] = encoding).refused(&[
            &format!("quantised by {name}"),
            "quantization_config",
            "--quant",
        ]);
    }
    // Its names alone, without the config's word.
    let packed = |key: &str| Some(key.replace("q_proj.weight", "q_proj.qweight"));
    Folder::new().rename(1, packed).refused(&["quantised for another program", "--quant"]);
    for family in ["qwen2_vl", "qwen3_vl", "llava", "mllama"] {
        let folder = Folder::new();
        folder.change("config.json", |c| c["model_type"] = family.into()).refused(&[family, "Qwen2.5-VL"]);
        let (_, stdout, stderr) = nextflow(folder.0.path(), &["info", "T"]);
        assert!(stdout.contains(family), "{stdout}{stderr}");
    }
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("use_sliding_window", json!(true)),
        ("layer_types", json!(["full_attention", "linear_attention", "full_attention"])),
        ("head_dim", json!(8)),
    ] {
        let folder = Folder::new();
        folder.change("config.json", |c| {
            c[key] = value;
            c["sliding_window"] = 16.into();
            c["max_window_layers"] = 1.into();
        });
        folder.refused(&[key]);
    }
}

#[test]
fn what_is_there_in_place_of_the_weights_is_named() {
    let none = || {
        let folder = Folder::new();
        folder.remove("model.safetensors");
        folder
    };
    none().refused(&["model.safetensors is missing"]);
    // No zip archive of torch.save.
    let folder = none();
    fs::write(folder.file("pytorch_model.bin"), b"\x80\x02}q\x00.").unwrap();
    folder.refused(&["pytorch_model.bin is not a PyTorch checkpoint", "save_pretrained"]);
    let folder = none();
    folder.write("adapter_config.json", &json!({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}));
    fs::write(folder.file("adapter_model.safetensors"), b"x").unwrap();
    folder.refused(&["LoRA adapter for Qwen/Qwen2.5-VL-3B-Instruct", "merge_and_unload"]);
    // An adapter's folder has no config.json.
    folder.remove("config.json").refused(&["LoRA adapter for Qwen/Qwen2.5-VL-3B-Instruct", "merge_and_unload"]);
    let folder = none();
    fs::write(folder.file("Qwen2.5-VL-3B-Q4_K_M.gguf"), b"GGUF").unwrap();
    folder.refused(&["Qwen2.5-VL-3B-Q4_K_M.gguf", "model.safetensors is missing"]);
    let lora = |key: &str| Some(format!("base_model.model.{key}").replace(".weight", ".lora_A.weight"));
    Folder::new().rename(1, lora).refused(&["LoRA adapter"]);
    // Shards without an index: their names count them, their headers say what they hold.
    let folder = Folder::new();
    folder.rename(3, |key| Some(key.into())).remove("model.safetensors.index.json").answers(141, &USUAL);
    folder.remove("model-00002-of-00003.safetensors");
    folder.refused(&["1 of 3 shards are missing", "model-00002-of-00003.safetensors"]);
}

/// A GGUF file of one small tensor, with or without a name of llama.cpp's.
#[test]
fn llama_cpps_names_are_named() {
    for (name, kind) in [("blk.0.attn_q.weight", 0u32), ("token_embd.weight", 0), ("blk.0.ffn_down.weight", 14)] {
        let mut bytes = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
        bytes.extend((name.len() as u64).to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(256u64.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32) + 1024, 0);
        let folder = Folder::new();
        fs::write(folder.remove("model.safetensors").file("model.gguf"), bytes).unwrap();
        folder.refused(&["model.gguf", "llama.cpp's"]);
        let (code, _, stderr) = nextflow(folder.0.path(), &["info", "T"]);
        assert!(code == 3 && stderr.contains("llama.cpp's"), "{stderr}");
    }
}

#[test]
fn pointers_of_git_lfs_are_named_in_any_file() {
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 7031645\n", "0".repeat(64));
    for file in [
        "tokenizer.json",
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "tokenizer_config.json",
        "chat_template.jinja",
        "processor_config.json",
        "model.safetensors.index.json",
    ] {
        let folder = Folder::new();
        if file.ends_with("index.json") {
            folder.remove("model.safetensors");
        }
        fs::write(folder.file(file), &pointer).unwrap();
        let (code, _, stderr) = folder.chat(&["hi"]);
        assert!(code == 3 && stderr.contains(file) && stderr.contains("git-lfs pointer"), "{file}: {stderr}");
    }
    for file in ["pytorch_model.bin", "model.gguf", "model.pt", "tokenizer.model"] {
        let folder = Folder::new();
        folder.remove(if file == "tokenizer.model" { "tokenizer.json" } else { "model.safetensors" });
        fs::write(folder.file(file), &pointer).unwrap();
        let (code, _, stderr) = folder.chat(&["hi"]);
        assert!(code == 3 && stderr.contains(file) && stderr.contains("git-lfs pointer"), "{file}: {stderr}");
    }
}

/// Sizes that the weights do not have are refused by the shapes, before anything of that size is
/// made.
#[test]
fn sizes_that_the_weights_do_not_have_are_refused_at_once() {
    for (width, part) in [(1u64 << 20, "1048576"), (1 << 24, "16777216"), (1 << 31, "2147483648"), (u64::MAX, "")] {
        let folder = Folder::new();
        folder.change("config.json", |c| c["vision_config"]["hidden_size"] = width.into());
        let started = std::time::Instant::now();
        for command in [&["info", "T"][..], &["chat", "--model", "T", "hi"]] {
            let (code, _, stderr) = nextflow(folder.0.path(), command);
            assert!(code == 3 && stderr.contains(part), "{command:?} {width}: {stderr}");
        }
        assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
    }
}
