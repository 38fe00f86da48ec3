//! Where the time of `nextflow gen` goes: loading, reading the prompt, every scale, decoding.
//!
//! `cargo bench --bench gen`

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use candle_core::Device;
use criterion::{Criterion, criterion_group, criterion_main};
use nextflow::checkpoint::Source;
use nextflow::generate::{Event, ImageCodes, Job, Model, schedule};

/// Draws one image and gives the time of the part between two events: part 0 is the prompt, part k
/// the k-th scale.
fn part(model: &Model, job: &Job, part: usize) -> Duration {
    let mut marks = vec![Instant::now()];
    let drawn = model.draw(job, &mut |event| {
        if !matches!(event, Event::Decode) {
            marks.push(Instant::now());
        }
        ControlFlow::Continue(())
    });
    drawn.expect("the embedded model draws");
    marks[part + 1] - marks[part]
}

fn generate(c: &mut Criterion) {
    let load = || Model::load(&Source::Embedded, &Device::Cpu, None).expect("the embedded model loads");
    c.bench_function("load", |b| b.iter(load));
    let model = load();
    let scales = schedule::nearest(1.0).prefix(model.config().scales).to_vec();
    let sampling = model.config().sampling.clone();
    let job = Job { prompt: "a red apple".into(), negative: None, scales: scales.clone(), sampling, seed: 1 };
    c.bench_function("prefill", |b| b.iter_custom(|n| (0..n).map(|_| part(&model, &job, 0)).sum()));
    for (i, (h, w)) in scales.iter().enumerate() {
        let name = format!("scale {h}x{w}");
        c.bench_function(&name, |b| b.iter_custom(|n| (0..n).map(|_| part(&model, &job, i + 1)).sum()));
    }
    let codes: ImageCodes = scales.iter().map(|(h, w)| vec![0; h * w]).collect();
    c.bench_function("decode", |b| b.iter(|| model.decode(&codes, &scales).expect("codes decode")));
    c.bench_function("image", |b| {
        b.iter(|| model.draw(&job, &mut |_| ControlFlow::Continue(())).expect("the embedded model draws"))
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = generate
}
criterion_main!(benches);
