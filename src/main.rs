//! Parse, dispatch, report: the library does the rest.

use std::process::ExitCode;

use nextflow::cli::{self, Cli};
use nextflow::{memory, terminal, threads};

fn main() -> ExitCode {
    terminal::ignore_file_size_signal();
    let mut verbose = false;
    let run = |cli: Cli| {
        verbose = cli.verbose;
        memory::keep(cli::trains(&cli.command));
        // The main thread is one of the pool: another one would sleep and have to be woken for
        // every matrix product.
        threads::start();
        cli::run(cli.command)
    };
    match cli::parse(std::env::args_os()).and_then(|cli| cli.map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::report(&error, verbose);
            ExitCode::from(error.exit_code())
        }
    }
}
