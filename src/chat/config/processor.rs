//! How images are made ready: processor_config.json (transformers 5) or preprocessor_config.json.

use serde::Deserialize;

use super::{bad, optional, whole, without_nulls};
use crate::checkpoint::Source;
use crate::error::Result;
use crate::vision::{ImageProcessor, VisionConfig};

/// The file of transformers 5, whose `image_processor` wins over the other file.
const NESTED: &str = "processor_config.json";
const PLAIN: &str = "preprocessor_config.json";

/// Pillow's number of the bicubic filter.
const BICUBIC: u8 = 3;

/// The fields of `Qwen2VLImageProcessor` that have an effect.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Public {
    image_processor_type: Option<String>,
    #[serde(deserialize_with = "whole")]
    min_pixels: Option<usize>,
    #[serde(deserialize_with = "whole")]
    max_pixels: Option<usize>,
    size: Size,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    do_center_crop: Option<bool>,
    do_pad: Option<bool>,
    resample: Option<u8>,
    rescale_factor: Option<f64>,
    patch_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    merge_size: Option<usize>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Size {
    #[serde(deserialize_with = "whole")]
    shortest_edge: Option<usize>,
    #[serde(deserialize_with = "whole")]
    longest_edge: Option<usize>,
    #[serde(deserialize_with = "whole")]
    min_pixels: Option<usize>,
    #[serde(deserialize_with = "whole")]
    max_pixels: Option<usize>,
}

/// The image processor of a checkpoint.
///
/// Errors: a file that is broken, or a setting that is not supported.
pub(super) fn read(source: &Source, vision: &VisionConfig, notes: &mut Vec<String>) -> Result<ImageProcessor> {
    let nested = optional(source, NESTED)?.get("image_processor").cloned();
    let (file, fields) = match nested {
        Some(fields) => (NESTED, fields),
        None => (PLAIN, optional(source, PLAIN)?),
    };
    if file == PLAIN && !source.has_file(PLAIN) {
        let usual = ImageProcessor::default();
        notes.push(format!(
            "{source} has neither {PLAIN} nor {NESTED}: images are scaled to {} to {} pixels, transformers' defaults",
            usual.min_pixels, usual.max_pixels
        ));
    }
    let broken = |what: String| bad(source, file, what);
    let public: Public = serde_json::from_value(without_nulls(fields)).map_err(|e| broken(e.to_string()))?;
    public.check(vision).map_err(broken)?;
    let usual = ImageProcessor::default();
    let Size { shortest_edge, longest_edge, min_pixels, max_pixels } = public.size;
    let processor = ImageProcessor {
        min_pixels: public.min_pixels.or(shortest_edge).or(min_pixels).unwrap_or(usual.min_pixels),
        max_pixels: public.max_pixels.or(longest_edge).or(max_pixels).unwrap_or(usual.max_pixels),
        image_mean: public.image_mean.unwrap_or(usual.image_mean),
        image_std: public.image_std.unwrap_or(usual.image_std),
    };
    processor.check().map_err(broken)?;
    Ok(processor)
}

impl Public {
    /// Errors: a setting that would make other patches of an image, as one sentence.
    fn check(&self, vision: &VisionConfig) -> Result<(), String> {
        let kind = self.image_processor_type.as_deref().unwrap_or("Qwen2VLImageProcessor");
        if !kind.starts_with("Qwen2VLImageProcessor") && !kind.starts_with("Qwen2_5_VLImageProcessor") {
            return Err(format!("image_processor_type {kind} is not supported"));
        }
        let steps =
            [("do_resize", self.do_resize), ("do_rescale", self.do_rescale), ("do_normalize", self.do_normalize)];
        if let Some((name, _)) = steps.iter().find(|(_, step)| *step == Some(false)) {
            return Err(format!("{name} false is not supported"));
        }
        let others = [("do_center_crop", self.do_center_crop), ("do_pad", self.do_pad)];
        if let Some((name, _)) = others.iter().find(|(_, step)| *step == Some(true)) {
            return Err(format!("{name} true is not supported"));
        }
        if let Some(filter) = self.resample.filter(|&filter| filter != BICUBIC) {
            return Err(format!("resample {filter} is not supported, only {BICUBIC} (bicubic)"));
        }
        if let Some(factor) = self.rescale_factor.filter(|factor| (factor * 255.0 - 1.0).abs() > 1e-6) {
            return Err(format!("rescale_factor {factor} is not supported, only 1/255"));
        }
        let sizes = [
            ("patch_size", self.patch_size, vision.patch_size),
            ("temporal_patch_size", self.temporal_patch_size, vision.temporal_patch_size),
            ("merge_size", self.merge_size, vision.spatial_merge_size),
        ];
        match sizes.iter().find(|(_, own, encoder)| own.is_some_and(|own| own != *encoder)) {
            Some((name, own, encoder)) => {
                Err(format!("{name} {} is not the image encoder's {encoder}", own.unwrap_or_default()))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn limits(files: &[(&str, Value)]) -> (Result<ImageProcessor>, usize) {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            std::fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        let vision = VisionConfig { temporal_patch_size: 2, ..VisionConfig::qwen2_5_vl(64) };
        let mut notes = Vec::new();
        (read(&Source::Folder(dir.path().into()), &vision, &mut notes), notes.len())
    }

    #[test]
    fn limits_of_pixels_have_many_names() {
        let usual = (3136, 1_003_520);
        for (fields, want) in [
            (json!({}), usual),
            (json!({"min_pixels": null, "max_pixels": null, "size": null}), usual),
            (json!({"min_pixels": 5000.0, "max_pixels": 6e4}), (5000, 60_000)),
            (json!({"size": {"shortest_edge": 4000, "longest_edge": 20_000}}), (4000, 20_000)),
            (json!({"size": {"shortest_edge": 4000.0, "longest_edge": null}}), (4000, usual.1)),
            (json!({"size": {"min_pixels": 4000, "max_pixels": 20_000}}), (4000, 20_000)),
            (json!({"size": {"shortest_edge": 4000, "longest_edge": 20_000}, "max_pixels": 9000}), (4000, 9000)),
        ] {
            let (processor, notes) = limits(&[(PLAIN, fields.clone())]);
            let processor = processor.unwrap();
            assert_eq!(((processor.min_pixels, processor.max_pixels), notes), (want, 0), "{fields}");
            // Nested, it wins over the other file.
            let nested = json!({"image_processor": fields});
            let other = json!({"min_pixels": 1, "max_pixels": 2});
            let processor = limits(&[(NESTED, nested), (PLAIN, other)]).0.unwrap();
            assert_eq!((processor.min_pixels, processor.max_pixels), want);
        }
        let processor = limits(&[(NESTED, json!({"processor_class": "x"})), (PLAIN, json!({"max_pixels": 9000}))]);
        assert_eq!(processor.0.unwrap().max_pixels, 9000);
        assert_eq!(limits(&[]).1, 1, "no note about the missing files");
    }

    #[test]
    fn what_would_change_pixels_is_refused_by_name() {
        for (key, value) in [
            ("do_resize", json!(false)),
            ("do_rescale", json!(false)),
            ("do_normalize", json!(false)),
            ("do_center_crop", json!(true)),
            ("resample", json!(2)),
            ("rescale_factor", json!(1.0)),
            ("patch_size", json!(16)),
            ("merge_size", json!(4)),
            ("image_processor_type", json!("CLIPImageProcessor")),
            ("image_std", json!([0.0, 1.0, 1.0])),
            ("max_pixels", json!(100)),
            ("max_pixels", json!(1.5)),
            ("min_pixels", json!(-1)),
            ("min_pixels", json!(1u64 << 53)),
            ("min_pixels", json!("many")),
        ] {
            let error = limits(&[(PLAIN, json!({key: value}))]).0.unwrap_err();
            assert_eq!(error.exit_code(), 3, "{key} {value}");
            assert!(error.message.contains(PLAIN), "{error}");
        }
    }
}
