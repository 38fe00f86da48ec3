use serde_json::Value;

use super::*;

#[test]
fn prompts_are_checked() {
    for (bytes, part) in [
        (&b""[..], "empty"),
        (b" \n ", "empty"),
        (b"caf\xff", "byte 3"),
        (&[b'a'; 1_000_000], "1000000 bytes"),
        (b"a\x1b[31m", "U+001B"),
    ] {
        let error = check_prompt(bytes).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains(part), "{}", error.message);
    }
    assert_eq!(check_prompt("  一只猫\n".as_bytes()).unwrap(), "一只猫");
}

#[test]
fn a_broken_file_is_an_error() {
    let model = |fields: &str| format!(r#"{{"version": "1.0", "model": {{"type": "BPE", {fields}}}}}"#);
    for json in [
        String::new(),
        "{}".into(),
        "[1, 2".into(),
        "[".repeat(10_000),
        model(r#""vocab": {"a": -1}, "merges": []"#),
        model(r#""vocab": {"a": 0}, "merges": ["a b"]"#),
        model(r#""continuing_subword_prefix": "aaaa", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]"#),
    ] {
        assert_eq!(Text::from_bytes(json.as_bytes()).unwrap_err().exit_code(), 3, "{json}");
    }
}

#[test]
fn control_words_of_a_file_are_plain_text_in_a_prompt() {
    let vocab: serde_json::Map<String, Value> =
        (b'!'..=b'~').enumerate().map(|(id, b)| ((b as char).to_string(), id.into())).collect();
    let added = |id: u32, content: &str, special: bool| {
        serde_json::json!({"id": id, "content": content, "special": special, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false})
    };
    let file = serde_json::json!({
        "version": "1.0",
        "added_tokens": [added(200, "<|im_start|>", true), added(201, "<tool_call>", false)],
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    let text = Text::from_bytes(file.to_string().as_bytes()).unwrap();
    for word in ["<|im_start|>", "<tool_call>"] {
        let ids = text.encode(word).unwrap();
        assert_eq!(ids.len(), word.len());
        assert!(ids.iter().all(|&id| id < 94), "{ids:?}");
    }
}

const NANO: &[u8] = include_bytes!("../../assets/nano/tokenizer.json");
const TINY: &[u8] = include_bytes!("../../tests/data/qwen/tiny/tokenizer.json");

/// A sound tokenizer.json with some of its parts replaced; `a.b` names `b` of `a`.
fn changed(file: &[u8], changes: &Value) -> Vec<u8> {
    let mut file: Value = serde_json::from_slice(file).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        *file.pointer_mut(&format!("/{}", key.replace('.', "/"))).unwrap() = value.clone();
    }
    file.to_string().into_bytes()
}

/// What loading a file, encoding a text and decoding its ids comes to.
fn used(file: &[u8], text: &str) -> Result<String> {
    let tokenizer = Text::from_bytes(file)?;
    tokenizer.decode(&tokenizer.encode(text)?)
}

fn refused(changes: &Value, part: &str) {
    for file in [NANO, TINY] {
        let error = used(&changed(file, changes), "a cat, a dog").unwrap_err();
        assert_eq!((error.exit_code(), error.hint.is_some()), (3, true), "{changes}: {error}");
        assert!(error.message.contains(part), "{changes}: {error}");
        assert!(error.message.len() < 400 && !error.message.contains('\n'), "{error}");
    }
}

#[test]
fn hostile_files_are_refused_by_name() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/hostile/tokenizer");
    for (name, part) in [
        ("bpe-dropout", "dropout"),
        ("decoder-doubles-26-times", "longer than 8"),
        ("decoder-strip-past-the-end", "decoder \"Strip\" takes away"),
        ("normalizer-doubles-26-times", "longer than 8"),
        ("normalizer-precompiled-8gb", "damaged table"),
        ("post-processor-names-sequence-b", "[\"B\"]"),
        ("pre-tokenizer-pieces-of-0", "pre-tokenizer \"FixedLength\" is not supported"),
    ] {
        let changes = std::fs::read(format!("{folder}/{name}.json")).unwrap();
        refused(&serde_json::from_slice(&changes).unwrap(), part);
    }
}

#[test]
fn other_components_are_refused_by_name() {
    let steps = |key: &str, step: Value, count: usize| serde_json::json!({"type": "Sequence", key: vec![step; count]});
    let replace =
        |pattern: Value, content: &str| serde_json::json!({"type": "Replace", "pattern": pattern, "content": content});
    let table = |bytes: &[u8]| serde_json::json!({"type": "Precompiled", "precompiled_charsmap": base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes)});
    let long = [&4u32.to_le_bytes()[..], &[0; 4], &[b'x'; 65]].concat();
    let cases = [
        // Eight steps that make sixteen bytes of one: 4 GB.
        (
            "normalizer",
            steps("normalizers", replace(serde_json::json!({"String": "a"}), "aaaaaaaaaaaaaaaa"), 8),
            "bytes of 12",
        ),
        ("normalizer", replace(serde_json::json!({"String": "a"}), &"a".repeat(17)), "17 bytes"),
        ("normalizer", replace(serde_json::json!({"String": ""}), "a"), "empty text"),
        ("normalizer", replace(serde_json::json!({"Regex": "(a|aa)+$"}), "a"), "regular expression of no known"),
        ("normalizer", replace(serde_json::json!({"Regex": "(a{1000}){1000}"}), "a"), "regular expression of no known"),
        ("normalizer", serde_json::json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)}), "1048576 bytes"),
        (
            "normalizer",
            serde_json::json!({"type": "BertNormalizer", "clean_text": true}),
            "\"BertNormalizer\" is not supported",
        ),
        (
            "normalizer",
            steps("normalizers", steps("normalizers", serde_json::json!({"type": "NFC"}), 1), 1),
            "within a sequence",
        ),
        ("normalizer", table(&long), "more than 64 bytes"),
        ("normalizer", table(&[3, 0, 0, 0, 1, 2, 3]), "damaged table"),
        ("normalizer", table(b""), "damaged table"),
        // A trie that leads far outside of itself: the library panics at the text.
        ("normalizer", table(&[4, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, b'a', 0]), "is damaged"),
        (
            "pre_tokenizer",
            serde_json::json!({"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false}),
            "regular expression of no known",
        ),
        ("pre_tokenizer", steps("pretokenizers", serde_json::json!({"type": "ByteLevel"}), 2), "ByteLevel twice"),
        ("pre_tokenizer", serde_json::json!({"type": "Metaspace"}), "no replacement"),
        ("decoder", replace(serde_json::json!({"String": "a"}), "aa"), "longer"),
        ("decoder", replace(serde_json::json!({"Regex": "\\s+"}), "a"), "longer"),
        ("decoder", serde_json::json!({"type": "Strip", "content": "a", "start": 0, "stop": 1}), "0 and 1 characters"),
        (
            "decoder",
            serde_json::json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "a", "cleanup": true}),
            "\"CTC\" is not supported",
        ),
        (
            "post_processor",
            serde_json::json!({"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}),
            "[\"A\", \"A\"]",
        ),
        ("model.type", "WordPiece".into(), "\"WordPiece\", not BPE"),
        ("model.unk_token", "<none>".into(), "unk_token"),
        ("model.end_of_word_suffix", "</w>".into(), "suffix"),
        ("model.merges", serde_json::json!([["a", "nothing"]]), "\"nothing\""),
        ("model.merges", serde_json::json!(["a b c"]), "merge"),
        ("model.vocab", serde_json::json!({"a": 0, "b": 0}), "same id"),
        ("model.vocab", serde_json::json!([["a", 0.0]]), "tokens and ids"),
        ("model.vocab", serde_json::json!({"x".repeat(1025): 0}), "1025 bytes"),
        ("added_tokens", serde_json::json!([{"id": 1, "content": "x".repeat(300)}]), "300 bytes"),
    ];
    for (key, value, part) in cases {
        refused(&serde_json::json!({key: value}), part);
    }
}

#[test]
fn vocabularies_are_bounded() {
    let refused = |file: String, part: &str| {
        let error = Text::from_bytes(file.as_bytes()).unwrap_err();
        assert!(error.exit_code() == 3 && error.message.contains(part), "{error}");
    };
    let words = |n: usize| (0..n).map(|i| format!("\"{i}\":{i}")).collect::<Vec<_>>().join(",");
    refused(
        format!(r#"{{"model": {{"type": "BPE", "vocab": {{{}}}, "merges": []}}}}"#, words((1 << 18) + 1)),
        "more than 262144 words",
    );
    let merges = vec![r#"["a","a"]"#; (1 << 19) + 1].join(",");
    refused(
        format!(r#"{{"model": {{"type": "BPE", "vocab": {{"a":0,"aa":1}}, "merges": [{merges}]}}}}"#),
        "more than 524288 merges",
    );
    // Numbers in the place of what is a few objects: each would take 16 times its bytes.
    let numbers = "0,".repeat(1 << 22) + "0";
    refused(
        format!(r#"{{"normalizer": {{"type": "NFC", "normalizers": [{numbers}]}}, "model": {{}}}}"#),
        "invalid type",
    );
    refused(format!(r#"{{"added_tokens": [{numbers}], "model": {{}}}}"#), "invalid type");
    refused(" ".repeat((32 << 20) + 1), "more than 33554432");
    refused("version https://git-lfs.github.com/spec/v1\noid sha256:0\n".into(), "git-lfs pointer");
}

#[test]
fn text_is_bounded_once_it_is_normalised() {
    let text = Text::from_bytes(NANO).unwrap();
    // Every one becomes 18 letters, spaces among them.
    let ligatures = "\u{fdfa}".repeat(2730);
    assert!(text.encode(&ligatures).unwrap().len() > 80_000);
    let error = text.encode(&"\u{fdfa}".repeat(20_000)).unwrap_err();
    assert_eq!((error.exit_code(), error.hint.is_some()), (2, true));
    assert!(error.message.contains("660000 bytes once it is normalised, the limit is 131072"), "{error}");
    assert_eq!(text.encode("a\0b").unwrap_err().exit_code(), 2);
    assert!(text.encode("").unwrap().is_empty() && text.encode(" \n ").unwrap().is_empty());
}

/// A Unigram model in the shape of T5's.
fn unigram() -> Value {
    let words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("a", -3.0),
        ("▁a", -3.5),
        ("b", -4.0),
        ("ab", -4.5),
    ];
    let added = [("<pad>", 0), ("</s>", 1), ("<unk>", 2)];
    serde_json::json!({
        "version": "1.0",
        "added_tokens": added.map(|(content, id)| serde_json::json!({"id": id, "content": content, "special": true})),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}]},
        "post_processor": {"type": "TemplateProcessing", "single": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}]},
        "decoder": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": true},
        "model": {"type": "Unigram", "unk_id": 2, "vocab": words},
    })
}

#[test]
fn unigram_vocabularies_take_the_best_path_and_never_a_control_token() {
    let text = Text::from_unigram(unigram().to_string().as_bytes()).unwrap();
    assert_eq!(text.encode("a  ab ﬁ").unwrap(), [5, 3, 7, 3, 2]);
    assert_eq!(text.decode(&[5, 3, 7]).unwrap(), "a ab");
    assert_eq!((text.control("</s>"), text.vocab_size()), (Some(1), 8));
    assert!(text.encode("</s> <pad>").unwrap().iter().all(|&id| id > 1));
    let refused = |change: &dyn Fn(&mut Value), part: &str| {
        let mut file = unigram();
        change(&mut file);
        let error = Text::from_unigram(file.to_string().as_bytes()).unwrap_err();
        assert!(error.exit_code() == 3 && error.message.contains(part), "{error}");
    };
    assert_eq!(Text::from_bytes(unigram().to_string().as_bytes()).unwrap_err().exit_code(), 3);
    refused(&|file| file["model"]["unk_id"] = Value::Null, "unk_id");
    refused(&|file| file["model"]["unk_id"] = 8.into(), "unk_id");
    refused(&|file| file["model"]["vocab"] = serde_json::json!({}), "tokens and scores");
    refused(&|file| file["model"]["vocab"][3][0] = "x".repeat(65).into(), "65 bytes");
    let words: Vec<(String, f64)> = (0..8192).map(|i| (format!("{i:064}").chars().rev().collect(), 0.0)).collect();
    refused(&|file| file["model"]["vocab"] = serde_json::to_value(&words).unwrap(), "nodes");
}

#[test]
fn added_tokens_that_are_not_special_stay_in_replies() {
    let tiny = Text::from_bytes(TINY).unwrap();
    let [start, call] = ["<|im_start|>", "<tool_call>"].map(|word| tiny.control(word).unwrap());
    assert_eq!(tiny.decode(&[start, call, 64]).unwrap(), format!("<tool_call>{}", tiny.decode(&[64]).unwrap()));
}

/// A Unigram that SentencePiece trained with normalisation rules of its own, and what the reference
/// makes of some texts.
#[test]
fn unigram_vocabularies_split_as_the_reference_does() {
    #[derive(serde::Deserialize)]
    struct Case {
        text: String,
        ids: Vec<u32>,
        decoded: String,
    }
    let text = Text::from_unigram(include_bytes!("../../tests/data/unigram.json")).unwrap();
    let cases: Vec<Case> = serde_json::from_str(include_str!("../../tests/data/unigram_tokens.json")).unwrap();
    assert!(cases.len() > 10 && cases.iter().any(|case| case.ids.contains(&2)));
    for case in cases {
        assert_eq!(text.encode(&case.text).unwrap(), case.ids, "{:?}", case.text);
        let decoded = case.decoded.replace("<unk>", "");
        assert_eq!(text.decode(&case.ids).unwrap(), decoded, "{:?}", case.ids);
    }
}
