//! `--device`: what computes.

use candle_core::Device;
use clap::Args;

use crate::device;
use crate::error::Result;

/// What computes.
#[derive(Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// Where to compute: auto, cpu, cuda, cuda:N or metal
    #[arg(long, default_value = "auto", env = "NEXTFLOW_DEVICE")]
    device: String,
}

impl DeviceArgs {
    /// The device that was asked for. Errors: as [`device::parse`].
    pub fn get(&self) -> Result<Device> {
        device::parse(&self.device)
    }
}
