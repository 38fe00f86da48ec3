//! `nextflow gen --jsonl`: the images of a file of jobs, with the model loaded once.

use std::iter::Peekable;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::draw::{Delivery, Line};
use super::r#gen::{self, GenArgs};
use crate::error::{Error, Kind, Result};
use crate::generate::cost::{self, Memory, Work};
use crate::generate::{Batch, Model, TRANSFORMER, schedule};
use crate::jobs::{Fault, Jobs, Reading, Shard, Task};
use crate::output::Destination;
use crate::request::Request;
use crate::terminal::{self, Console};
use crate::{input, memory};

/// Flags for files of jobs.
#[derive(Args, Clone, Debug, Default)]
pub struct JobsArgs {
    /// Draw a file of jobs, one JSON object a line: {"prompt": "a cat", "out": "cat.png", "seed": 7}; also id, negative, size, cfg,
    /// cfg_until, temperature, top_k, top_p and draft; flags stand for what a line does not tell; `-` reads standard input
    /// as it comes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "from", "think", "output", "count", "preview"])]
    pub jsonl: Option<PathBuf>,
    /// With --jsonl: leave out jobs whose image is there already
    #[arg(long)]
    pub resume: bool,
    /// With --jsonl: go on after a job that fails
    #[arg(long)]
    pub keep_going: bool,
    /// With --jsonl: draw the K-th of N parts only, for as many processes
    #[arg(long, value_name = "K/N")]
    pub shard: Option<Shard>,
}

impl JobsArgs {
    /// Errors: usage, for what means something with a file of jobs only. (clap's `requires` is not asked where what is required
    /// conflicts with another flag that is there.)
    pub fn check(&self) -> Result<()> {
        let flags = [(self.resume, "--resume"), (self.keep_going, "--keep-going"), (self.shard.is_some(), "--shard")];
        match flags.into_iter().find(|(given, _)| *given && self.jsonl.is_none()) {
            Some((_, flag)) => Err(Error::usage(format!("{flag} is for a file of jobs")).hint("--jsonl FILE")),
            None => Ok(()),
        }
    }
}

/// A line of output for an image.
#[derive(Serialize)]
struct Done<'a> {
    line: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(flatten)]
    image: Line<'a>,
}

/// A line of output for a job that failed.
#[derive(Serialize)]
struct Failed<'a> {
    line: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    error: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    code: u8,
}

/// What `--dry-run` tells.
#[derive(Serialize)]
struct Plan<'a> {
    model: &'a str,
    images: usize,
    there: usize,
    faults: usize,
    codes: usize,
    passes: usize,
    memory: Memory,
    peak_memory: u64,
}

/// Jobs that failed, and whether the others go on.
struct Failures {
    keep_going: bool,
    count: usize,
}

impl Failures {
    /// Tells of a job that failed.
    ///
    /// Errors: what failed, if nothing is to go on.
    fn add(&mut self, Fault { line, id, error }: Fault) -> Result<()> {
        if !self.keep_going || error.kind == Kind::Interrupted {
            return Err(error);
        }
        self.count += 1;
        terminal::report(&error);
        let (id, hint, code) = (id.as_deref(), error.hint.as_deref(), error.exit_code());
        terminal::emit_json(&Failed { line, id, error: &error.message, hint, code }).map(drop)
    }

    /// Errors: some failed.
    fn end(&self, of: usize) -> Result<()> {
        match self.count {
            0 => Ok(()),
            n => Err(Error::new(Kind::Failure, format!("{n} of {of} jobs failed"))
                .hint("see the errors above; --resume draws what is not there yet")),
        }
    }
}

/// Draws the jobs of `file`. All of a file is checked before the model loads; standard input is read as it comes.
pub(super) fn run(args: &GenArgs, file: &Path) -> Result<()> {
    if let [_, second, ..] = args.draw.seed[..] {
        return Err(Error::usage("--jsonl takes one --seed, for the lines that tell none")
            .hint(format!("\"seed\": {second} in a line")));
    }
    let mut request = Request::of_jobs(&args.draw)?;
    request.negative = r#gen::negative(args, &request)?;
    let request = &request;
    let batch = r#gen::batch(args, usize::MAX)?;
    let JobsArgs { resume, keep_going, shard, .. } = args.jobs;
    let name = input::shown(file);
    let folder = args.draw.out_dir.as_deref().unwrap_or(Path::new(""));
    let reading = Reading { name: &name, request, flags: &args.draw, draft: args.draft, folder, resume, shard };
    let mut jobs = Jobs::new(reading, input::lines(file, "--jsonl FILE, or - for standard input")?);
    let mut failures = Failures { keep_going, count: 0 };

    // What a pipe brings is not waited for, unless it is only to be checked.
    let wait = !input::is_stdin(file) || args.draw.dry_run;
    let all: Vec<_> = if wait { jobs.by_ref().collect() } else { Vec::new() };
    let (seen, there) = (jobs.seen(), jobs.there());
    if wait && seen == 0 && all.is_empty() {
        return Err(Error::usage(format!("{name} holds no job")).hint("one a line: {\"prompt\": \"a red apple\"}"));
    }
    if !keep_going && all.iter().any(Result::is_err) {
        return all.into_iter().find_map(|next| next.err()).map_or(Ok(()), |fault| Err(fault.error));
    }
    let work = forecast(request, &all, batch.min(all.len().max(1)), args)?;
    if args.draw.dry_run {
        Model::check(&request.source, &request.config)?;
        plan(request, &all, there, work, args.draw.json)?;
        for fault in all.iter().filter_map(|next| next.as_ref().err()) {
            terminal::report(&fault.error);
            failures.count += 1;
        }
        return failures.end(all.len());
    }
    if there > 0 && !args.draw.quiet {
        terminal::note(&format!("({there} of {seen} images are there already)"));
    }
    if wait && all.is_empty() {
        return Ok(());
    }
    request.source.find(TRANSFORMER)?;
    memory::check(work.peak(), &request.device, "a smaller --batch, --quant q8_0, or --quant q4_K")?;
    let mut console = Console::new(args.draw.level(), all.len().max(1) as u64);
    let stop = terminal::interrupts()?;
    console.loading();
    let started = Instant::now();
    let model = Model::load(&request.source, &request.device, request.weights)?;
    console.detail(&format!("loaded {} in {:.2} s", request.model, started.elapsed().as_secs_f64()));
    if !wait {
        console.clear();
    }
    let mut delivery = Delivery { request, console, stop, json: true, preview: None, edit: None };
    let mut tasks = all.into_iter().chain(jobs).peekable();
    let mut tried = 0;
    while let Some(next) = tasks.next() {
        tried += 1;
        let first = match next {
            Ok(task) => task,
            Err(fault) => {
                failures.add(fault)?;
                continue;
            }
        };
        let group = together(first, &mut tasks, batch);
        tried += group.len() - 1;
        if !draw(&model, &group, folder, &name, &mut delivery, &mut failures)? {
            return Ok(()); // The reader of our output has gone: nobody wants the rest.
        }
    }
    failures.end(tried)
}

/// A job and those behind it that are drawn in the same pass, up to so many in all.
fn together(first: Task, tasks: &mut Peekable<impl Iterator<Item = Result<Task, Fault>>>, batch: usize) -> Vec<Task> {
    let mut group = vec![first];
    while group.len() < batch {
        let same = |next: &Result<Task, Fault>| next.as_ref().is_ok_and(|task| task.goes_with(&group[0]));
        match tasks.next_if(same) {
            Some(Ok(task)) => group.push(task),
            _ => break,
        }
    }
    group
}

/// Draws some jobs in one pass over every scale and keeps what comes; whether anybody wants more.
fn draw(
    model: &Model,
    group: &[Task],
    folder: &Path,
    name: &str,
    delivery: &mut Delivery,
    failures: &mut Failures,
) -> Result<bool> {
    let fault = |task: &Task, error: &Error| {
        let message = format!("line {} of {name}: {}", task.line, error.message);
        let error = Error { kind: error.kind, message, hint: error.hint.clone() };
        Fault { line: task.line, id: task.id.clone(), error }
    };
    let Some(first) = group.first() else { return Ok(true) };
    let started = Instant::now();
    delivery.console.start(group.len() as u64);
    let (prompts, seeds): (Vec<&str>, Vec<u64>) = group.iter().map(|task| (&*task.job.prompt, task.job.seed)).unzip();
    let batch = Batch { scales: &first.job.scales, sampling: &first.job.sampling, seeds: &seeds };
    let drawn = model.draw_batch(&prompts, first.job.negative.as_deref(), batch, &mut |event| {
        delivery.event(&event, |codes, scales| model.decode(codes, scales))
    });
    let took = started.elapsed() / group.len() as u32;
    let images = match drawn {
        Ok(images) => images,
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(error) => {
            group.iter().try_for_each(|task| failures.add(fault(task, &error)))?;
            return Ok(true);
        }
    };
    for (task, image) in group.iter().zip(&images) {
        let to = match &task.out {
            Some(out) => Destination::File { path: folder.join(out), force: false },
            None => Destination::Folder(folder.into()),
        };
        match delivery.keep(&task.job, image, None, took, &to) {
            Ok(kept) => {
                let done = Done { line: task.line, id: task.id.as_deref(), image: kept.line(&task.job, None) };
                if terminal::emit_json(&done)?.is_break() {
                    return Ok(false);
                }
            }
            Err(error) => failures.add(fault(task, &error))?,
        }
    }
    Ok(true)
}

/// Memory for the largest of the jobs, or for what the flags tell where they are still to come.
fn forecast(request: &Request, all: &[Result<Task, Fault>], images: usize, args: &GenArgs) -> Result<Memory> {
    let tasks = || all.iter().flatten();
    let usual = args.draw.size.parse::<crate::size::Size>()?.grids(&request.config)?;
    let largest = tasks().map(|task| &task.job.scales).max_by_key(|scales| schedule::codes(scales));
    let sampling = tasks().map(|task| &task.job.sampling).max_by_key(|sampling| sampling.guided(usual.len()));
    let texts = tasks().flat_map(|task| task.job.negative.iter().chain(Some(&task.job.prompt)));
    let words = texts.map(|text| cost::tokens(text)).max().unwrap_or(0);
    let (scales, sampling) = (largest.unwrap_or(&usual), sampling.unwrap_or(&request.sampling));
    let work = Work { scales, images, words, sampling };
    cost::memory(&request.config, &request.source, request.weights, work, &request.device)
}

fn plan(request: &Request, all: &[Result<Task, Fault>], there: usize, memory: Memory, json: bool) -> Result<()> {
    let tasks = || all.iter().flatten().map(|task| &task.job);
    let passes =
        tasks().map(|job| (0..job.scales.len() - job.sampling.draft).map(|si| job.sampling.passes(si)).sum::<usize>());
    let plan = Plan {
        model: &request.model,
        images: tasks().count(),
        there,
        faults: all.iter().filter(|next| next.is_err()).count(),
        codes: tasks().map(|job| schedule::codes(&job.scales)).sum(),
        passes: passes.sum(),
        memory,
        peak_memory: memory.peak(),
    };
    if json {
        return terminal::emit_json(&plan).map(drop);
    }
    let Plan { images, there, faults, codes, passes, peak_memory, .. } = plan;
    let text = format!(
        "{images} images with {}, {there} more there already, {faults} lines at fault: {codes} codes, {passes} passes\n\
         memory {:.0} MB\n",
        terminal::clean(&request.model),
        peak_memory as f64 / 1e6
    );
    terminal::emit(text.as_bytes()).map(drop)
}
