//! `nextflow eval` with the embedded model, on a case or two of each kind.
#![cfg(feature = "nano")]

mod common;

use std::path::Path;

/// The JSON that it prints.
#[track_caller]
fn json(args: &[&str]) -> serde_json::Value {
    let output = common::command(Path::new("."), args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn shares_come_with_intervals_and_cases_and_oblong_images_are_drawn() {
    let args = ["eval", "--suite", "oblong", "--per-category", "2", "--json"];
    let report = json(&args);
    let ratios = report["oblong"].as_array().unwrap();
    assert!(ratios.iter().map(|r| r["ratio"].as_str().unwrap()).eq(["16:9", "9:16", "4:1"]));
    for ratio in ratios {
        for share in ["score", "ceiling", "ground_truth"].map(|name| &ratio[name]) {
            let [value, low, high] = ["share", "low", "high"].map(|key| share[key].as_f64().unwrap());
            assert!(0.0 <= low && low <= value && value <= high && high <= 1.0 && high - low > 0.5, "{ratio}");
            assert_eq!(share["cases"].as_str().unwrap().len(), 2);
        }
        assert_eq!(ratio["ground_truth"]["share"], 1.0, "the detector reads scenes of any ratio");
    }
    assert_eq!(report["compositions"].as_array().unwrap().len(), 0, "no other suite runs");
}

#[test]
fn a_model_does_not_differ_from_itself() {
    let args = ["eval", "--compare", "nano", "embedded", "--suite", "compositions", "--per-category", "1"];
    let compared = json(&[&args[..], &["--json"]].concat());
    assert_eq!(compared["models"], serde_json::json!(["nano", "embedded"]));
    let differences = compared["differences"].as_array().unwrap();
    assert!(differences.iter().map(|d| d["name"].as_str().unwrap()).eq([
        "single object",
        "two objects",
        "counting",
        "colours",
        "position",
        "attribute binding",
        "mean"
    ]));
    for d in differences {
        assert_eq!((d["difference"].as_f64(), d["beyond_chance"].as_bool()), (Some(0.0), Some(false)), "{d}");
        assert_eq!(d["a"], d["b"]);
    }
    let [a, b] = [0, 1].map(|i| &compared["reports"][i]["compositions"]);
    assert_eq!(a, b, "the cases are the same");
}

#[test]
fn dialogues_are_told_apart_by_wording() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cases.jsonl");
    let cases = file.to_str().unwrap();
    let args = ["eval", "--suite", "dialogues", "--per-category", "1", "--json", "--cases", cases];
    let report = json(&args);
    for (kind, count) in [("edits", 9), ("questions", 6)] {
        let rows = report["dialogues"][kind].as_array().unwrap();
        assert_eq!(rows.len(), count);
        for row in rows {
            let wordings = row["wordings"].as_array().unwrap();
            let cases: usize = wordings.iter().map(|w| w["score"]["cases"].as_str().unwrap().len()).sum();
            assert_eq!(cases, 1, "{row}");
            let right = |share: &serde_json::Value| share["cases"].as_str().unwrap().matches('1').count();
            assert_eq!(wordings.iter().map(|w| right(&w["score"])).sum::<usize>(), right(&row["score"]), "{row}");
        }
    }
    let lines = std::fs::read_to_string(file).unwrap();
    let cases: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |task: &str| cases.iter().filter(|case| case["task"] == task).count();
    // Edits and questions in held-out wordings and in trained ones; riddles about shapes and things.
    assert_eq!(["edit", "question", "draw then edit", "riddle"].map(of), [18, 12, 1, 2]);
    for case in cases.iter().filter(|case| case["task"] == "question") {
        assert_eq!(case["right"], case["expected"].as_str().unwrap() == case["reply"].as_str().unwrap().trim());
    }
}

#[test]
fn a_comparison_needs_two_models_that_there_are() {
    let refused = |args: &[&str], code: i32, message: &str| {
        let output = common::command(Path::new("."), args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).to_string();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(message), "{args:?}: {said}");
    };
    refused(&["eval", "--compare", "nano"], 2, "--compare");
    refused(&["eval", "--compare", "nano", "no/such/folder"], 3, "no/such/folder");
    refused(&["eval", "--compare", "nano", "nano", "--wordings"], 2, "--wordings");
}
