//! `nextflow encode`: convert an image to codes.

use std::path::PathBuf;

use clap::Args;
use image::ImageFormat;

use super::{DeviceArgs, ModelArgs, request};
use crate::codes::CodeFile;
use crate::error::{Error, Result};
use crate::generate::Size;
use crate::io::input;
use crate::io::output::{self, Destination};
use crate::{pixels, terminal};

/// Flags of `nextflow encode`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  nextflow encode photo.jpg -o codes.json && nextflow decode codes.json -o back.png\n  \
                        nextflow encode photo.jpg --model infinity_vae_d32reg.pth --size 512x512 -o bits.safetensors"
)]
pub struct EncodeArgs {
    /// PNG, JPEG or WebP; `-` reads standard input
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,
    /// WIDTHxHEIGHT in pixels, WIDTH:HEIGHT as a ratio, or auto (the image's ratio); the image is
    /// cropped to it
    #[arg(long, default_value = "auto")]
    pub size: String,
    /// Token grids ROWSxCOLUMNS, coarse to fine, instead of --size (Infinity tokenizers)
    #[arg(long, value_name = "1x1,2x2,...", conflicts_with = "size")]
    pub scales: Option<String>,
    /// Write the codes to FILE: safetensors if its name ends in .safetensors, else JSON [default:
    /// JSON to standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Overwrite an existing file
    #[arg(long, requires = "output")]
    pub force: bool,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs `nextflow encode`.
pub(super) fn run(args: &EncodeArgs) -> Result<()> {
    let size: Size = args.size.parse()?;
    let scales = args.scales.as_deref().map(grids).transpose()?;
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
    let tokenizer = args.model.tokenizer()?;
    let (image, scales) = tokenizer.prepare(&image, size, scales)?;
    let codes = tokenizer.encode(&image, &scales, &device)?;
    let (space, model) = (tokenizer.space(), tokenizer.name);
    let codes = CodeFile { model, space, scales, codes };
    let bytes =
        match args.output.as_ref().and_then(|p| p.extension()).is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) {
            true => codes.to_safetensors()?,
            // A model's name comes from outside.
            false => terminal::escaped(&String::from_utf8_lossy(&codes.to_json()?)).into_bytes(),
        };
    let _ = match destination.save(&bytes, "", 0)? {
        None => terminal::emit(&bytes)?,
        Some(path) => terminal::emit_path(&path)?,
    };
    Ok(())
}

/// The grids (height, width) of `--scales`.
fn grids(text: &str) -> Result<Vec<(usize, usize)>> {
    let grid = |grid: &str| {
        let (h, w) = grid.split_once('x')?;
        let side = |side: &str| side.parse::<usize>().ok().filter(|_| side.bytes().all(|b| b.is_ascii_digit()));
        Some((side(h)?, side(w)?))
    };
    text.split(',').map(grid).collect::<Option<_>>().ok_or_else(|| {
        Error::usage(format!("--scales {text} is no list of grids")).hint("--scales 1x1,2x2,4x4,6x6,8x8,12x12,16x16")
    })
}
