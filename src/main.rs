//! Parse, dispatch, report: the library does the rest.

use std::process::ExitCode;

use nextflow::{cli, memory, terminal, threads};

fn main() -> ExitCode {
    terminal::ignore_file_size_signal();
    // The main thread is one of the pool: any other would fall asleep and be woken for every product of matrices.
    let run = |command| {
        memory::keep(cli::trains(&command));
        threads::start();
        cli::run(command)
    };
    match cli::parse(std::env::args_os()).and_then(|command| command.map_or(Ok(()), run)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::report(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
