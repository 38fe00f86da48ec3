//! The binary, as the tests of its commands run it.

use std::path::Path;
use std::process::Command;

/// A command in a folder, with nothing of the environment that chooses a model or a device.
pub fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nextflow"));
    command.args(args).current_dir(folder).env_remove("NEXTFLOW_MODEL").env_remove("NEXTFLOW_DEVICE");
    command
}
