use super::*;

fn concept(label: &str) -> Concept {
    Concept {
        hexcode: "1F34E".into(),
        label: label.into(),
        names: vec![label.into(), "pippin".into()],
        label_zh: "红苹果".into(),
        tags: vec!["fruit".into()],
        tags_zh: vec![],
        group: 4,
        subgroup: 42,
        everyday: true,
        held_out: false,
    }
}

/// One opaque square of 64 x 64 in the middle, and one empty picture.
fn library() -> Library {
    let mut square = vec![0; BYTES];
    for (i, p) in square.chunks_exact_mut(4).enumerate() {
        if (32..96).contains(&(i % SIDE)) && (32..96).contains(&(i / SIDE)) {
            p.copy_from_slice(&[200, 100, 50, 255]);
        }
    }
    square.extend(vec![0; BYTES]);
    let pictures = [Style::ThreeD, Style::Noto].map(|style| Picture { concept: 0, style }).to_vec();
    Library::new(vec![concept("red apple")], pictures, square).unwrap()
}

#[test]
fn a_library_survives_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/library.safetensors");
    let library = library();
    library.save(&path).unwrap();
    let read = Library::load(&path).unwrap();
    assert_eq!(read.concepts, library.concepts);
    assert_eq!(read.pictures, library.pictures);
    assert!((0..2).all(|p| read.rgba(p) == library.rgba(p)));
    assert_eq!(read.find("Red Apple"), Some(0));
    assert_eq!(read.find("PIPPIN"), Some(0));
    assert_eq!((read.picture(0, Style::Noto), read.picture(0, Style::Flat)), (Some(1), None));
    assert_eq!((read.everyday(false).count(), read.everyday(true).count()), (1, 0));
}

#[test]
fn a_broken_or_missing_file_is_an_error_that_names_the_commands() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("library.safetensors");
    let error = |path: &Path| Library::load(path).err().unwrap();
    assert!(error(&path).hint.unwrap().contains("train -- train data"));
    library().save(&path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 4, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let e = error(&path);
        assert!(e.kind == Kind::Model && e.hint.unwrap().contains("fetch-data.sh"), "cut at {cut}");
    }
    assert!(Library::new(vec![], vec![Picture { concept: 0, style: Style::Flat }], vec![0; BYTES]).is_err());
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

#[test]
fn captions_begin_with_the_canonical_one() {
    let captions = library().captions(0);
    assert_eq!(captions[0], "a red apple");
    for form in ["red apple", "a picture of a red apple", "a pippin", "红苹果"] {
        assert!(captions.iter().any(|c| c == form), "{form} in {captions:?}");
    }
}
