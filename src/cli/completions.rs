//! `nextflow completions`: the script by which a shell completes commands and flags.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::error::Result;
use crate::terminal;

/// Flags of `nextflow completions`.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  nextflow completions bash > ~/.local/share/bash-completion/completions/nextflow\n  \
                  nextflow completions zsh > ~/.zfunc/_nextflow\n  \
                  nextflow completions fish > ~/.config/fish/completions/nextflow.fish"
)]
pub struct CompletionsArgs {
    /// Shell to complete for
    pub shell: Shell,
}

/// Runs `nextflow completions`.
pub(super) fn run(args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "nextflow", &mut script);
    terminal::emit(&script).map(drop)
}
