//! Parse, dispatch, report: the library does the rest.

use std::process::ExitCode;

use nextflow::{cli, terminal};

fn main() -> ExitCode {
    match cli::parse().and_then(|command| command.map_or(Ok(()), cli::run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
