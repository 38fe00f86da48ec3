use super::*;

/// Files that Pillow wrote, 45 x 37 pixels of noise.
fn files() -> impl Iterator<Item = (&'static str, Vec<u8>)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/images/");
    let names = ["baseline.jpg", "progressive.jpg", "restarts.jpg", "grey-progressive.jpg", "cmyk.jpg", "turned.jpg"];
    names.into_iter().map(move |name| (name, std::fs::read(format!("{folder}{name}")).unwrap()))
}

/// Where the first scan's data begin.
fn data(bytes: &[u8]) -> usize {
    let at = bytes.windows(2).position(|pair| pair == [0xff, 0xda]).unwrap();
    at + 2 + number(bytes, at + 2).unwrap()
}

#[test]
fn a_cut_anywhere_is_found() {
    for (name, whole) in files() {
        assert_eq!(fault(&whole), None, "{name}");
        for end in 2..whole.len() {
            assert_eq!(fault(&whole[..end]), Some(CUT), "{name} cut at {end} of {}", whole.len());
        }
    }
}

#[test]
fn what_is_missing_in_the_middle_is_found() {
    // The others are of one colour: what is missing there may be padding.
    for (name, whole) in files().take(4) {
        let start = data(&whole);
        // The end is there, but not what comes before it. Between two scans a progressive file is a
        // coarser one.
        let ends = start..whole.len() - 4;
        let found = ends.clone().filter(|end| fault(&[&whole[..*end], &[0xff, 0xd9]].concat()).is_some()).count();
        let expected = if name.contains("progressive") { ends.len() * 9 / 10 } else { ends.len() };
        assert!(found >= expected, "{name}: {found} of {}", ends.len());
        let length = whole.len() - start;
        let hole = [&whole[..start + length / 3], &whole[start + length / 2..]].concat();
        assert!(fault(&hole).is_some(), "{name} with a hole");
    }
}

#[test]
fn what_cameras_add_is_no_fault() {
    for (name, whole) in files() {
        let second = [&whole[..], &[0; 5], &whole[..whole.len() / 2]].concat();
        assert_eq!(fault(&second), None, "{name} with another image behind it");
        let (head, tail) = whole.split_at(2);
        // A thumbnail, which has an end of its own, within a segment.
        let thumbnail = [0xff, 0xd8, 0xff, 0xda, 0xff, 0xd9];
        let segment = [&[0xff, 0xe1, 0, 8 + 2][..], b"E\0", &thumbnail].concat();
        assert_eq!(fault(&[head, &segment, &segment, tail].concat()), None, "{name} with a thumbnail");
        let (body, end) = whole.split_at(whole.len() - 2);
        assert_eq!(fault(&[body, &[0xff; 3], end].concat()), None, "{name} with fill bytes");
        assert_eq!(fault(&[body, &[0; 20], end].concat()), None, "{name} with padding");
    }
}
