//! The files of the small model `nano`, part of the binary with the feature of that name.

/// A file of the built-in model; none if this build has no model in it.
#[cfg(feature = "nano")]
pub(super) fn file(name: &str) -> Option<&'static [u8]> {
    match name {
        "config.json" => Some(include_bytes!("../../assets/nano/config.json")),
        "tokenizer.json" => Some(include_bytes!("../../assets/nano/tokenizer.json")),
        "model.safetensors" => Some(include_bytes!("../../assets/nano/model.safetensors")),
        "image_tokenizer.safetensors" => Some(include_bytes!("../../assets/nano/image_tokenizer.safetensors")),
        "refiner.safetensors" => Some(include_bytes!("../../assets/nano/refiner.safetensors")),
        _ => None,
    }
}

/// A file of the built-in model; none if this build has no model in it.
#[cfg(not(feature = "nano"))]
pub(super) fn file(_name: &str) -> Option<&'static [u8]> {
    None
}
