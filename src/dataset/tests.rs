use super::*;

fn concept(label: &str) -> Concept {
    Concept {
        label: label.into(),
        names: vec![label.into(), "pippin".into()],
        label_zh: "红苹果".into(),
        everyday: true,
        ..Concept::default()
    }
}

/// One opaque square of 64 x 64 in the middle, and one empty picture.
fn library() -> Dataset {
    let mut square = vec![0; BYTES];
    for (i, p) in square.chunks_exact_mut(4).enumerate() {
        if (32..96).contains(&(i % SIDE)) && (32..96).contains(&(i / SIDE)) {
            p.copy_from_slice(&[200, 100, 50, 255]);
        }
    }
    square.extend(vec![0; BYTES]);
    let pictures = [Style::ThreeD, Style::Noto].map(|style| CaptionedImage { concept: 0, style: Some(style) }).to_vec();
    Dataset::new(vec![concept("red apple")], pictures, square).unwrap()
}

#[test]
fn a_library_survives_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/library.safetensors");
    let library = library();
    library.save(&path).unwrap();
    let read = Dataset::load(&path).unwrap();
    assert_eq!(read.concepts, library.concepts);
    assert_eq!(read.pictures, library.pictures);
    assert!((0..2).all(|p| read.rgba(p) == library.rgba(p)));
    assert_eq!(read.find("Red Apple"), Some(0));
    assert_eq!(read.find("PIPPIN"), Some(0));
    assert_eq!((read.picture(0, Style::Noto), read.picture(0, Style::Flat)), (Some(1), None));
    assert_eq!((read.everyday(false).count(), read.everyday(true).count()), (1, 0));
    assert_eq!(read.drawn(0), Some(0));
}

/// What `nextflow train data` wrote until November 2026, with more fields than are read.
#[test]
fn an_older_file_is_read_and_says_what_it_said() {
    let json = r#"{"concepts": [{"hexcode": "1F697", "label": "automobile", "names": ["car", "automobile"],
        "label_zh": "汽车", "tags": ["car", "vehicle"], "tags_zh": ["交通工具"], "group": 5, "subgroup": 60,
        "everyday": true, "held_out": true}], "pictures": [{"concept": 0, "style": "noto"}, {"concept": 0, "style": "3d"}]}"#;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("library.safetensors");
    let rgba = vec![7; 2 * BYTES];
    let rgba = TensorView::new(Dtype::U8, vec![2, SIDE, SIDE, 4], &rgba).unwrap();
    let metadata = HashMap::from([("library".to_string(), json.to_string())]);
    safetensors::serialize_to_file([("rgba", rgba)], Some(metadata), &path).unwrap();
    let library = Dataset::load(&path).unwrap();
    assert_eq!((library.picture(0, Style::Noto), library.drawn(0)), (Some(0), Some(1)));
    assert_eq!(library.everyday(true).collect::<Vec<_>>(), [0]);
    let captions = library.captions(0);
    assert_eq!(
        captions,
        [
            "a car",
            "car",
            "a picture of a car",
            "an image of a car",
            "a drawing of a car",
            "draw a car",
            "an automobile",
            "automobile",
            "汽车",
            "一张汽车的图片",
        ]
    );
    assert_eq!(library.caption(0), captions[0]);
}

#[test]
fn captions_of_its_own_are_all_that_a_concept_is_called() {
    let captions = vec!["my dog Rex on a sofa".to_string(), "沙发上的狗".into()];
    let concept = Concept { label: captions[0].clone(), captions: captions.clone(), ..concept("dog") };
    let library =
        Dataset::new(vec![concept], vec![CaptionedImage { concept: 0, style: None }], vec![255; BYTES]).unwrap();
    assert_eq!((library.captions(0), library.caption(0)), (captions.clone(), captions[0].clone()));
    assert_eq!((library.drawn(0), library.picture(0, Style::ThreeD)), (Some(0), None));
    let silent = Concept { label: "nothing".into(), ..Concept::default() };
    let error = Dataset::new(vec![silent], vec![], vec![]).err().unwrap();
    assert!(error.message.contains("nothing") && error.hint.is_some(), "{error}");
}

#[test]
fn a_background_shows_unless_every_pixel_is_opaque() {
    let concepts = || vec![concept("red apple")];
    let opaque = |rgba: Vec<u8>| {
        Dataset::new(concepts(), vec![CaptionedImage { concept: 0, style: None }], rgba).unwrap().is_opaque(0)
    };
    let mut rgba = vec![255; BYTES];
    assert!(opaque(rgba.clone()));
    rgba[BYTES - 1] = 254;
    assert!(!opaque(rgba));
}

#[test]
fn a_broken_or_missing_file_is_an_error_that_names_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("library.safetensors");
    let error = |path: &Path| Dataset::load(path).err().unwrap();
    assert!(error(&path).hint.unwrap().contains("train -- train data"));
    library().save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 4, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let e = error(&path);
        assert!(e.kind == Kind::Model && e.hint.unwrap().contains("fetch-data.sh"), "cut at {cut}");
    }
    assert!(Dataset::new(vec![], vec![CaptionedImage { concept: 0, style: None }], vec![0; BYTES]).is_err());
}

#[test]
fn pictures_are_composited_and_clipped() {
    let library = library();
    let over = library.over(0, [1, 2, 3]);
    assert_eq!(over[..3], [1, 2, 3]);
    assert_eq!(over[3 * (64 * SIDE + 64)..][..3], [200, 100, 50]);

    let mut canvas = Canvas::new(SIDE, SIDE, [1, 2, 3]);
    library.compose(&mut canvas, 0, (0, 0), SIDE);
    assert!(canvas.rgb == over, "at full size compose is over");

    // At a quarter of the size the square is 16 x 16, from (8, 8) of the paste on.
    let mut canvas = Canvas::new(40, 20, [0; 3]);
    library.compose(&mut canvas, 0, (12, -4), 32);
    let lit: Vec<usize> = (0..800).filter(|i| canvas.rgb[3 * i..3 * i + 3] == [200, 100, 50]).collect();
    assert_eq!(lit.len(), 16 * 16);
    assert_eq!((lit[0], lit[255]), (4 * 40 + 20, 19 * 40 + 35));
    for (at, size) in [((-500, 3), 32), ((100, 100), 7), ((0, 0), 0), ((i32::MAX, i32::MIN), 50)] {
        let before = canvas.clone();
        library.compose(&mut canvas, 0, at, size);
        assert_eq!(canvas, before);
    }
}

#[test]
fn an_odd_size_keeps_the_light() {
    let pixels = resize(library().rgba(0), 37);
    let alpha: f32 = pixels.iter().map(|p| p[3]).sum();
    assert!((alpha / (37.0 * 37.0) - 255.0 / 4.0).abs() < 0.01);
    assert!(pixels.iter().all(|p| p[3] == 0.0 || (p[0] / p[3] * 255.0 - 200.0).abs() < 0.01));
}

#[test]
fn the_split_is_fixed() {
    let held: Vec<&str> = ["1F34E", "1F436", "1F697", "1F352", "1F40C", "1F30B", "1F3E0", "1F3B8", "1F955", "1F419"]
        .into_iter()
        .filter(|h| held_out(h))
        .collect();
    assert_eq!(held, ["1F697"]);
    let share = (0x1F300..0x1F900).filter(|c| held_out(&format!("{c:X}"))).count();
    assert!((120..190).contains(&share), "{share} of 1536");
}
