//! The refiner against PyTorch on the same random weights: the network at three times, and a whole
//! refinement.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor};
use nextflow::checkpoint::Weights;
use nextflow::refiner::{Captions, Condition, Refiner, RefinerConfig};
use nextflow::rng::{Rng, Stream};
use serde::Deserialize;

#[derive(Deserialize)]
struct Tiny {
    config: RefinerConfig,
    captions: Vec<Vec<u32>>,
    seeds: Vec<u64>,
    steps: usize,
}

struct Golden {
    tiny: Tiny,
    refiner: Refiner,
    condition: Condition,
    captions: Captions,
    io: HashMap<String, Tensor>,
}

fn golden() -> Result<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/refiner");
    let tiny: Tiny = serde_json::from_slice(&std::fs::read(folder.join("tiny.json"))?).expect("tiny.json");
    let io = candle_core::safetensors::load(folder.join("tiny.io.safetensors"), &Device::Cpu)?;
    let weights = folder.join("tiny.weights.safetensors");
    let weights = Weights::from_safetensors(&[weights], DType::F32, &Device::Cpu)?;
    let refiner = Refiner::load(&weights, &tiny.config)?;
    let condition = Condition::new(&io["picture"], &io["f"], &io["semantic"], &tiny.config)?;
    let ids: Vec<&[u32]> = tiny.captions.iter().map(Vec::as_slice).collect();
    let captions = Captions::new(&ids, &tiny.config.caption, &Device::Cpu)?;
    Ok(Golden { tiny, refiner, condition, captions, io })
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f32> {
    assert_eq!(a.dims(), b.dims());
    (a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

#[test]
fn predictions_are_those_of_pytorch() -> Result<()> {
    let Golden { refiner, condition, captions, io, .. } = golden()?;
    let t = io["t"].to_vec1::<f32>()?;
    let predicted = refiner.predict(&io["z"], &t, &condition, &captions)?;
    let far = distance(&predicted, &io["predicted"])?;
    assert!(far < 1e-4, "off by {far}");
    Ok(())
}

#[test]
fn a_whole_refinement_is_that_of_pytorch() -> Result<()> {
    let Golden { tiny, refiner, condition, captions, io } = golden()?;
    let rngs: Vec<Rng> = tiny.seeds.iter().map(|&seed| Rng::new(seed, 0, Stream::Refine, 0)).collect();
    let on = &mut |_, _| ControlFlow::Continue(());
    let refined = refiner.refine(&condition, &captions, &rngs, tiny.steps, on)?.expect("nothing stops it");
    let far = distance(&refined, &io["refined"])?;
    assert!(far < 1e-4, "off by {far}");
    Ok(())
}
