//! Parse, dispatch, report: the library does the rest.

use std::process::ExitCode;

use nextflow::{cli, memory, terminal};

fn main() -> ExitCode {
    // A thread of the pool shares work with the others at once; any other thread would fall asleep and be woken for every
    // product of matrices.
    let run = |command| {
        memory::keep(cli::trains(&command));
        rayon::scope(|_| cli::run(command))
    };
    match cli::parse(std::env::args_os()).and_then(|command| command.map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
