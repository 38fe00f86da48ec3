//! `nextflow decode`: convert codes to an image.

use std::io::Cursor;
use std::path::PathBuf;

use clap::Args;
use image::ImageFormat;

use super::{DeviceArgs, ModelArgs, request};
use crate::codes::CodeFile;
use crate::error::{Error, Result};
use crate::io::input;
use crate::io::output::{self, Destination};
use crate::terminal;

/// Flags of `nextflow decode`.
#[derive(Args, Debug)]
pub struct DecodeArgs {
    /// File written by `nextflow encode`; `-` reads standard input
    #[arg(value_name = "CODES")]
    pub codes: PathBuf,
    /// Decode the first N scales only
    #[arg(long, value_name = "N")]
    pub scales: Option<usize>,
    /// Write the PNG to FILE; `-` writes it to standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
    /// Overwrite an existing file
    #[arg(long)]
    pub force: bool,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// The device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs `nextflow decode`.
pub(super) fn run(args: &DecodeArgs) -> Result<()> {
    let destination = match output::is_stdout(&args.output) {
        true => Destination::Stdout,
        false => Destination::File { path: args.output.clone(), force: args.force },
    };
    if args.force && destination == Destination::Stdout {
        return Err(request::for_files("--force"));
    }
    destination.check()?;
    if destination == Destination::Stdout {
        request::no_terminal()?;
    }
    let device = args.device.get()?;
    let tokenizer = args.model.tokenizer()?;
    let mut codes = CodeFile::read(&args.codes)?;
    codes.check(&tokenizer)?;
    if codes.model != tokenizer.name {
        terminal::note(&format!("(these are codes of {}, this is {}: another image)", codes.model, tokenizer.name));
    }
    if let Some(scales) = args.scales {
        let held = codes.codes.len();
        if !(1..=held).contains(&scales) {
            let message = format!("--scales {scales}, but {} holds 1 to {held}", input::shown(&args.codes));
            return Err(Error::usage(message).hint(format!("--scales {held}")));
        }
        codes.codes.truncate(scales);
    }
    let image = tokenizer.decode(&codes.codes, &codes.scales, &device)?;
    let mut png = Cursor::new(Vec::new());
    image.write_to(&mut png, ImageFormat::Png).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
    let png = png.into_inner();
    let _ = match destination.save(&png, "", 0)? {
        None => terminal::emit(&png)?,
        Some(path) => terminal::emit_path(&path)?,
    };
    Ok(())
}
