//! Where the image of a job goes: `out` and `id` are names from outside, which must not lead out of
//! the folder of all images.

use std::path::{Component, Path, PathBuf};

use crate::error::{Error, Result};
use crate::io::output::slug;
use crate::terminal;

/// The longest name of a file, and the longest path, in bytes.
const MAX_NAME: usize = 255;
const MAX_PATH: usize = 4096;

/// The path of an image below the folder of all: `out`, or a name made of `id`.
///
/// Errors: usage, for anything but a plain path of a PNG.
pub(super) fn of(out: Option<&str>, id: Option<&str>) -> Result<Option<PathBuf>> {
    let Some(out) = out else { return Ok(id.map(|id| format!("{}.png", slug(id)).into())) };
    const HINT: &str = r#""out": "fruit/apple.png""#;
    if out.len() > MAX_PATH {
        let message = format!("out has {} bytes, no path has more than {MAX_PATH}", out.len());
        return Err(Error::usage(message).hint(HINT));
    }
    let path = Path::new(out);
    let bad = |what: &str| Err(Error::usage(format!("out {out:?} {what}")).hint(HINT));
    let inside = |part: Component| matches!(part, Component::Normal(_) | Component::CurDir);
    if out.contains('\\') {
        let hint = format!("\"out\": {:?}", out.replace('\\', "/"));
        return Err(Error::usage(format!("out {out:?} has a backslash; folders are separated by /")).hint(hint));
    }
    if out.is_empty() || terminal::clean(out) != out || !path.components().all(inside) {
        return bad("is not a place below the folder of the images");
    }
    if out.ends_with('/') || path.extension().is_none_or(|e| !e.eq_ignore_ascii_case("png")) {
        return bad("is not the name of a PNG");
    }
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_)));
    if parts.clone().any(|part| part.as_os_str().len() > MAX_NAME) {
        return bad("has a name of more than 255 bytes");
    }
    Ok(Some(parts.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_stay_below_the_folder() {
        let place = |out: &str| of(Some(out), Some("x")).map(|path| path.unwrap());
        assert_eq!(place("a/b/c.png").unwrap(), Path::new("a/b/c.png"));
        assert_eq!(place("./a//b/./c.png").unwrap(), Path::new("a/b/c.png"));
        assert!(place(&format!("{}.png", "x".repeat(252))).is_err());
        assert!(place(&format!("{}c.png", "a/".repeat(2000))).is_ok());
        let long = place(&format!("{}c.png", "a/".repeat(30_000))).unwrap_err();
        assert!(long.message.contains("60005 bytes") && long.message.len() < 100, "{long}");
        assert_eq!(of(None, Some("The 1st/../x")).unwrap().unwrap(), Path::new("the-1st-x.png"));
        assert_eq!(of(None, None).unwrap(), None);
        for out in [
            "",
            "../x.png",
            "/etc/x.png",
            "a/../../x.png",
            "a\\b.png",
            "a\0.png",
            "a\u{1b}[2J.png",
            "a.jpg",
            "a",
            "a.png/",
        ] {
            let error = place(out).unwrap_err();
            assert_eq!((error.exit_code(), error.hint.is_some()), (2, true), "{out:?}");
        }
    }
}
