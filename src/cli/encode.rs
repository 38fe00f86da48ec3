//! `nextflow encode`: an image's codes.

use std::path::PathBuf;

use clap::Args;
use image::ImageFormat;

use super::{DeviceArgs, ModelArgs, request};
use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::output::{self, Destination};
use crate::size::Size;
use crate::{input, pixels, terminal};

/// Flags of `nextflow encode`.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  nextflow encode photo.jpg -o codes.json && nextflow decode codes.json -o back.png")]
pub struct EncodeArgs {
    /// PNG, JPEG or WebP; `-` reads standard input
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto (the image's ratio); what does not fit is cut off
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Write here, as safetensors if the name ends in .safetensors, else as JSON [default: JSON to standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Let -o replace a file
    #[arg(long, requires = "output")]
    pub force: bool,
    #[command(flatten)]
    pub model: ModelArgs,
    /// What computes.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs `nextflow encode`.
pub(super) fn run(args: &EncodeArgs) -> Result<()> {
    let size: Size = args.size.parse()?;
    let destination = match &args.output {
        Some(path) if !output::is_stdout(path) => Destination::File { path: path.clone(), force: args.force },
        _ if args.force => return Err(request::for_files("--force")),
        _ => Destination::Stdout,
    };
    if let Some(path) = args.output.as_ref().filter(|path| ImageFormat::from_path(path).is_ok()) {
        let message = format!("{} is the name of an image, but encode writes codes", path.display());
        return Err(Error::usage(message).hint(format!("-o {}", input::quoted(&path.with_extension("json")))));
    }
    destination.check()?;
    let device = args.device.get()?;
    let image = pixels::open_or_read(&args.image, "nextflow gen \"a red apple\" -o - | nextflow encode -")?;
    let codec = args.model.codec()?;
    let (image, scales) = codec.prepare(&image, size)?;
    let (h, w) = (image.height() as usize, image.width() as usize);
    let tokenizer = codec.load(&device)?;
    let encoded = tokenizer.encode(&pixels::to_tensor(&[image.as_raw()], h, w, &device)?, &scales)?;
    let codes = encoded.into_iter().next().map(|e| e.codes).unwrap_or_default();
    let codebook_size = codec.config().codebook.size;
    let codes = Codes { model: codec.name, codebook_size, scales, codes };
    let bytes =
        match args.output.as_ref().and_then(|p| p.extension()).is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            true => codes.to_safetensors()?,
            // The name of a model is anybody's.
            false => terminal::escaped(&String::from_utf8_lossy(&codes.to_json()?)).into_bytes(),
        };
    let _ = match destination.save(&bytes, "", 0)? {
        None => terminal::emit(&bytes)?,
        Some(path) => terminal::emit_path(&path)?,
    };
    Ok(())
}
