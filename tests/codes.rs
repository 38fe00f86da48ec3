//! Codes of images, out to a file and back.

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
    assert!(output.stderr.is_empty());
    output.stdout
}

#[track_caller]
fn refused(folder: &Path, args: &[&str], part: &str) {
    let output = nextflow(folder, args);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty() && stderr.starts_with("error: ") && stderr.contains(part), "{stderr}");
    assert!(stderr.lines().nth(1).is_some_and(|l| l.starts_with("hint: ")), "{stderr}");
}

/// A wide picture: a red square left of the middle, on pale yellow.
fn picture(path: &Path) {
    let mut image = image::RgbImage::from_pixel(320, 180, image::Rgb([250, 245, 200]));
    (60..140).for_each(|x| (50..130).for_each(|y| image.put_pixel(x, y, image::Rgb([210, 30, 30]))));
    image.save(path).unwrap();
}

#[test]
fn an_image_goes_out_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    picture(&here.join("in.png"));
    let json = works(here, &["encode", "in.png"]);
    let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(value["scales"].as_array().unwrap().len(), 8);
    std::fs::write(here.join("a.json"), &json).unwrap();
    works(here, &["encode", "in.png", "-o", "b.safetensors"]);
    works(here, &["decode", "a.json", "-o", "a.png"]);
    let other = works(here, &["decode", "b.safetensors", "-o", "-"]);
    assert_eq!(std::fs::read(here.join("a.png")).unwrap(), other, "both formats hold the same codes");
    // As PowerShell writes what it redirects.
    let utf16 = format!("\u{feff}{}", String::from_utf8(json.clone()).unwrap());
    let utf16: Vec<u8> = utf16.encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(here.join("c.json"), utf16).unwrap();
    assert_eq!(works(here, &["decode", "c.json", "-o", "-"]), other);
    let back = image::open(here.join("a.png")).unwrap().to_rgb8();
    assert!(back.width() > back.height(), "{:?}", back.dimensions());
    // The colours are where they were, as far as the small tokenizer goes.
    let at = |x: f64, y: f64| back[((x * f64::from(back.width())) as u32, (y * f64::from(back.height())) as u32)].0;
    let near = |a: [u8; 3], b: [u8; 3]| a.iter().zip(b).all(|(a, b)| a.abs_diff(b) < 70);
    assert!(near(at(0.31, 0.5), [210, 30, 30]), "{:?}", at(0.31, 0.5));
    assert!(near(at(0.9, 0.1), [250, 245, 200]), "{:?}", at(0.9, 0.1));
    // A prefix of the scales is a coarser picture of the same size.
    let coarse = works(here, &["decode", "a.json", "--scales", "2", "-o", "-"]);
    let coarse = image::load_from_memory(&coarse).unwrap().to_rgb8();
    assert!(coarse.dimensions() == back.dimensions() && coarse != back);
    // Same image, same codes, also where the size is named.
    let size = format!("{}x{}", back.width(), back.height());
    assert_eq!(works(here, &["encode", "in.png", "--size", &size]), json);
}

#[test]
fn codes_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let here = dir.path();
    picture(&here.join("in.png"));
    let json = String::from_utf8(works(here, &["encode", "in.png", "--size", "1:1"])).unwrap();
    let changed = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = serde_json::from_str(&json).unwrap();
        change(&mut value);
        std::fs::write(here.join("bad.json"), value.to_string()).unwrap();
    };
    let decode = ["decode", "bad.json", "-o", "x.png"];
    changed(&|v| v["codes"][2][1] = 4_000_000_000u32.into());
    refused(here, &decode, "scale 3 has code 4000000000, but there are");
    changed(&|v| v["codes"][1] = serde_json::json!([1, 2, 3]));
    refused(here, &decode, "scale 2 (2x2) has 3 codes");
    changed(&|v| v["scales"][7] = serde_json::json!([4096, 4096]));
    refused(here, &decode, "has no schedule");
    changed(&|v| v["codebook_size"] = 7.into());
    refused(here, &decode, "codebook of 7");
    changed(&|v| v["codes"] = serde_json::json!([]));
    refused(here, &decode, "codes of no scale");
    changed(&|v| v["more"] = 1.into());
    refused(here, &decode, "unknown field");
    // Those of another model may still mean something.
    changed(&|v| v["model"] = "other".into());
    let output = nextflow(here, &["decode", "bad.json", "-o", "other.png"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && stderr == "(these are codes of other, this is nano: another image)\n",
        "{stderr}"
    );
    std::fs::write(here.join("bad.json"), "").unwrap();
    refused(here, &decode, "is not a file of codes");
    refused(here, &["decode", "none.json", "-o", "x.png"], "cannot read none.json");
    std::fs::write(here.join("bad.json"), &json).unwrap();
    refused(here, &["decode", "bad.json", "--scales", "9", "-o", "x.png"], "--scales 9");
    refused(here, &["encode", "bad.json"], "as an image");
    refused(here, &["encode", "in.png", "--size", "0x0"], "--size");
    refused(here, &["decode", "bad.json", "-o", "in.png"], "already exists");
    assert!(!here.join("x.png").exists());
}
