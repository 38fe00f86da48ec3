//! Builds the picture library from the packages that `fetch-data.sh` fetches.
//!
//! Every picture is cropped to its object and scaled so that the object's longer side spans seven
//! eighths of its own, centred: then size and place carry no noise, and scenes put them where the
//! sentence says.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use image::imageops::{self, FilterType};
use image::{Rgba32FImage, RgbaImage};
use rayon::prelude::*;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg::{Options, Tree};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::names::{NAMES, NEAR_DUPLICATES, entries};
use crate::dataset::{self, CaptionedImage, Concept, Dataset, SIDE, Style};
use crate::error::{Error, Kind, Result};

/// Folders of the packages, named as `fetch-data.sh` names them.
const FLUENT_3D: &str = "lobehub-fluent-emoji-3d-1.1.0";
const FLUENT_FLAT: &str = "iconify-json-fluent-emoji-flat-1.2.6";
const NOTO: &str = "iconify-json-noto-1.2.9";
const EMOJIBASE: &str = "emojibase-data-17.0.0";

/// Longer side of every object, as a share of its picture's.
const OBJECT: f32 = 0.875;
/// Pixels of at most this alpha (of 255) are not part of the object.
const FAINT: u8 = 8;

/// Groups of emojibase: all but component (2) and flags (9).
const GROUPS: [u32; 8] = [0, 1, 3, 4, 5, 6, 7, 8];
/// Of these, things a person would ask to have drawn: animals and nature, food and drink, travel
/// and places, activities, objects.
const EVERYDAY_GROUPS: std::ops::RangeInclusive<u32> = 3..=7;

/// The library of the packages under `packages`, with pictures of `side` pixels; beyond [`SIDE`]
/// only those that models learn to draw.
///
/// Errors: a package is missing or holds something unreadable.
pub fn prepare(packages: &Path, side: usize) -> Result<Dataset> {
    let concepts = concepts(&packages.join(EMOJIBASE))?;
    let fluent = Files::open(&packages.join(FLUENT_3D).join("assets"))?;
    let flat = Icons::open(&packages.join(FLUENT_FLAT))?;
    let noto = Icons::open(&packages.join(NOTO))?;

    let draw = |(key, _): &(String, Concept)| -> Result<Vec<(Style, Vec<u8>)>> {
        let mut drawn = vec![(Style::ThreeD, fluent.draw(key, side)?)];
        if side <= SIDE {
            drawn.extend([(Style::Flat, flat.draw(key, side)?), (Style::Noto, noto.draw(key, side)?)]);
        }
        Ok(drawn.into_iter().filter_map(|(style, pixels)| Some((style, pixels?))).collect())
    };
    let drawn: Vec<_> = concepts.par_iter().map(draw).collect::<Result<_>>()?;

    // Concepts without a picture drop out.
    let (mut kept, mut pictures, mut rgba) = (Vec::new(), Vec::new(), Vec::new());
    for ((_, concept), drawn) in concepts.into_iter().zip(drawn).filter(|(_, drawn)| !drawn.is_empty()) {
        for (style, pixels) in drawn {
            pictures.push(CaptionedImage { concept: kept.len(), style: Some(style) });
            rgba.extend(pixels);
        }
        kept.push(concept);
    }
    Dataset::of_side(side, kept, pictures, rgba)
}

/// An entry of emojibase's `data.json`.
#[derive(Deserialize)]
struct Emoji {
    /// Unicode code points in upper-case hexadecimal, joined by `-`.
    hexcode: String,
    label: String,
    group: Option<u32>,
    order: Option<u32>,
}

/// All concepts in the order of Unicode, each after the [`key`] of its pictures. Skin-tone variants
/// are nested within their base form and so left out.
fn concepts(emojibase: &Path) -> Result<Vec<(String, Concept)>> {
    let mut english: Vec<Emoji> = read(&emojibase.join("en/data.json"))?;
    let chinese: Vec<Emoji> = read(&emojibase.join("zh/data.json"))?;
    let chinese: HashMap<String, Emoji> = chinese.into_iter().map(|e| (e.hexcode.clone(), e)).collect();
    english.retain(|e| e.group.is_some_and(|g| GROUPS.contains(&g)));
    english.sort_by_key(|e| e.order);

    let duplicates: HashSet<&str> = entries(NEAR_DUPLICATES).collect();
    let names: HashMap<&str, Vec<String>> = entries(NAMES)
        .filter_map(|e| e.split_once(": "))
        .map(|(label, names)| (label, names.split(", ").map(str::to_string).collect()))
        .collect();
    let labels: HashSet<&str> = english.iter().map(|e| e.label.as_str()).collect();
    if let Some(label) = duplicates.iter().chain(names.keys()).find(|l| !labels.contains(**l)) {
        return Err(Error::new(Kind::Failure, format!("emojibase has no label {label:?}")));
    }

    let mut taken = HashSet::new();
    english
        .iter()
        .map(|e| {
            let everyday = e.group.is_some_and(|g| EVERYDAY_GROUPS.contains(&g))
                && !is_clock_face(&e.label)
                && !duplicates.contains(e.label.as_str());
            let names =
                names.get(e.label.as_str()).cloned().unwrap_or_else(|| vec![e.label.replace('’', "'").to_string()]);
            if let Some(name) = names.iter().find(|n| everyday && !taken.insert(n.to_lowercase())) {
                return Err(Error::new(Kind::Failure, format!("two everyday concepts are named {name:?}")));
            }
            let zh = chinese.get(&e.hexcode);
            let concept = Concept {
                label: e.label.clone(),
                names,
                label_zh: zh.map(|z| z.label.clone()).unwrap_or_default(),
                captions: Vec::new(),
                everyday,
                held_out: dataset::held_out(&e.hexcode),
            };
            Ok((key(&e.hexcode), concept))
        })
        .collect()
}

/// "one o’clock" to "twelve-thirty".
fn is_clock_face(label: &str) -> bool {
    label.ends_with("o’clock") || label.ends_with("-thirty")
}

/// A hexcode as all packages can be made to agree on: lower case, without variation selectors.
fn key(hexcode: &str) -> String {
    let code = hexcode.to_lowercase();
    code.split('-').filter(|c| *c != "fe0f").collect::<Vec<_>>().join("-")
}

/// Parses a JSON file.
fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| missing(path, &e))?;
    serde_json::from_slice(&text).map_err(|e| broken(path, &e))
}

fn missing(path: &Path, e: &std::io::Error) -> Error {
    let message = format!("cannot read {}: {e}", path.display());
    Error::usage(message).hint("run `sh src/train/fetch-data.sh`")
}

fn broken(path: &Path, e: &dyn std::fmt::Display) -> Error {
    let message = format!("{} is broken: {e}", path.display());
    Error::usage(message).hint("remove its package folder and run `sh src/train/fetch-data.sh`")
}

/// A folder of pictures by hexcode.
struct Files(HashMap<String, PathBuf>);

impl Files {
    fn open(folder: &Path) -> Result<Self> {
        let mut files = HashMap::new();
        for entry in std::fs::read_dir(folder).map_err(|e| missing(folder, &e))? {
            let path = entry?.path();
            if let Some(stem) = path.file_stem().and_then(|s| s.to_str()) {
                files.insert(key(stem), path);
            }
        }
        Ok(Self(files))
    }

    fn draw(&self, key: &str, side: usize) -> Result<Option<Vec<u8>>> {
        let Some(path) = self.0.get(key) else { return Ok(None) };
        let image = image::open(path).map_err(|e| broken(path, &e))?;
        Ok(fit_raster(&image.to_rgba8(), side))
    }
}

/// An icon set of Iconify: vector pictures by name, and names by hexcode.
struct Icons {
    path: PathBuf,
    names: HashMap<String, String>,
    set: IconSet,
}

#[derive(Deserialize)]
struct IconSet {
    width: f32,
    height: f32,
    icons: HashMap<String, Icon>,
    #[serde(default)]
    aliases: HashMap<String, Alias>,
}

#[derive(Deserialize)]
struct Icon {
    body: String,
    width: Option<f32>,
    height: Option<f32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Alias {
    parent: String,
    #[serde(default)]
    h_flip: bool,
}

impl Icons {
    fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("icons.json");
        let names: HashMap<String, String> = read(&folder.join("chars.json"))?;
        let names = names.into_iter().map(|(code, name)| (key(&code), name)).collect();
        Ok(Self { names, set: read(&path)?, path })
    }

    fn draw(&self, key: &str, side: usize) -> Result<Option<Vec<u8>>> {
        let Some(name) = self.names.get(key) else { return Ok(None) };
        let alias = self.set.aliases.get(name);
        let flip = if alias.is_some_and(|a| a.h_flip) { -1.0 } else { 1.0 };
        let Some(icon) = self.set.icons.get(alias.map_or(name, |a| &a.parent)) else { return Ok(None) };
        let (width, height) = (icon.width.unwrap_or(self.set.width), icon.height.unwrap_or(self.set.height));
        let svg = format!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{width}" height="{height}" viewBox="0 0 {width} {height}">{}</svg>"#,
            icon.body
        );
        let tree =
            Tree::from_str(&svg, &Options::default()).map_err(|e| broken(&self.path, &format!("{name}: {e}")))?;
        Ok(fit_vector(&tree, width.max(height), flip, side))
    }
}

/// Left, top, width and height of the visible part.
fn bounds(rgba: &[u8], width: usize) -> Option<[u32; 4]> {
    let solid = rgba.chunks_exact(4).enumerate().filter(|(_, p)| p[3] > FAINT);
    let places = solid.map(|(i, _)| ((i % width) as u32, (i / width) as u32));
    let [l, t, r, b] = places
        .fold([u32::MAX, u32::MAX, 0, 0], |[l, t, r, b], (x, y)| [l.min(x), t.min(y), r.max(x + 1), b.max(y + 1)]);
    (l < r).then(|| [l, t, r - l, b - t])
}

/// A raster picture cropped, scaled and centred; `None` where there is nothing to see.
fn fit_raster(image: &RgbaImage, side: usize) -> Option<Vec<u8>> {
    let [left, top, width, height] = bounds(image, image.width() as usize)?;
    // Scaled with alpha premultiplied: colour that cannot be seen must not bleed in.
    let object = Rgba32FImage::from_fn(width, height, |x, y| {
        let [r, g, b, a] = image.get_pixel(left + x, top + y).0.map(|v| v as f32 / 255.0);
        image::Rgba([r * a, g * a, b * a, a])
    });
    let scale = OBJECT * side as f32 / width.max(height) as f32;
    let [w, h] = [width, height].map(|v| ((v as f32 * scale).round() as u32).max(1));
    let object = imageops::resize(&object, w, h, FilterType::CatmullRom);
    let mut out = RgbaImage::new(side as u32, side as u32);
    let (x0, y0) = ((side as u32 - w) / 2, (side as u32 - h) / 2);
    for (x, y, &image::Rgba([r, g, b, a])) in object.enumerate_pixels() {
        let alpha = a.clamp(0.0, 1.0);
        if alpha >= 0.5 / 255.0 {
            let straight = [r / alpha, g / alpha, b / alpha, alpha].map(|v| (v.clamp(0.0, 1.0) * 255.0).round() as u8);
            out.put_pixel(x0 + x, y0 + y, image::Rgba(straight));
        }
    }
    Some(out.into_raw())
}

/// A vector picture, `extent` units wide or high, rendered so that it is cropped, scaled and
/// centred; `flip` of -1 mirrors it.
fn fit_vector(tree: &Tree, extent: f32, flip: f32, side: usize) -> Option<Vec<u8>> {
    // Rendered once to see where the object is, then again so that it falls into place.
    let probe = 2.0 * side as f32;
    let render = |side: u32, transform| {
        let mut pixmap = Pixmap::new(side, side)?;
        resvg::render(tree, transform, &mut pixmap.as_mut());
        Some(pixmap)
    };
    let zoom = probe / extent;
    let [left, top, width, height] =
        bounds(render(probe as u32, Transform::from_scale(zoom, zoom))?.data(), probe as usize)?;
    let scale = OBJECT * side as f32 / width.max(height) as f32;
    let middle = [left as f32 + width as f32 / 2.0, top as f32 + height as f32 / 2.0];
    let half = side as f32 / 2.0;
    let [dx, dy] = [half - flip * scale * middle[0], half - scale * middle[1]];
    let pixmap = render(side as u32, Transform::from_row(flip * scale * zoom, 0.0, 0.0, scale * zoom, dx, dy))?;
    let straight = pixmap.pixels().iter().map(|p| p.demultiply());
    Some(straight.flat_map(|p| [p.red(), p.green(), p.blue(), p.alpha()]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alpha_bounds(picture: &[u8]) -> [u32; 4] {
        bounds(picture, SIDE).unwrap()
    }

    #[test]
    fn objects_fill_the_picture_and_keep_their_shape() {
        let mut image = RgbaImage::new(256, 256);
        for (x, y) in (10..90).flat_map(|x| (200..240).map(move |y| (x, y))) {
            image.put_pixel(x, y, image::Rgba([250, 128, 10, 255]));
        }
        let raster = fit_raster(&image, SIDE).unwrap();
        assert_eq!(alpha_bounds(&raster), [8, 36, 112, 56]);
        assert_eq!(raster[4 * (64 * SIDE + 64)..][..4], [250, 128, 10, 255]);
        assert!(fit_raster(&RgbaImage::new(9, 9), SIDE).is_none());

        let svg = r##"<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"><rect x="2" y="20" width="10" height="5" fill="#fa800a"/></svg>"##;
        let tree = Tree::from_str(svg, &Options::default()).unwrap();
        for flip in [1.0, -1.0] {
            let vector = fit_vector(&tree, 32.0, flip, SIDE).unwrap();
            assert_eq!(alpha_bounds(&vector), [8, 36, 112, 56]);
            assert_eq!(vector[4 * (64 * SIDE + 64)..][..4], [250, 128, 10, 255]);
        }
    }

    #[test]
    fn hexcodes_meet_across_packages() {
        assert_eq!(key("1F441-FE0F-200D-1F5E8-FE0F"), "1f441-200d-1f5e8");
        assert_eq!(key("2764"), key("2764-fe0f"));
    }

    #[test]
    fn the_tables_are_well_formed() {
        assert!(is_clock_face("one o’clock") && is_clock_face("six-thirty") && !is_clock_face("alarm clock"));
        assert!(entries(NEAR_DUPLICATES).all(|e| !e.is_empty() && !e.contains("  ")));
        let mut labels = HashSet::new();
        for entry in entries(NAMES) {
            let (label, names) = entry.split_once(": ").unwrap();
            assert!(labels.insert(label), "{label} twice");
            assert!(names.split(", ").all(|n| !n.is_empty() && n.trim() == n && !n.contains("  ")), "{entry}");
        }
    }

    #[test]
    fn missing_packages_name_the_command() {
        let dir = tempfile::tempdir().unwrap();
        let error = prepare(dir.path(), SIDE).err().unwrap();
        assert!(error.hint.unwrap().contains("fetch-data.sh"));
    }
}
