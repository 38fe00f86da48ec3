//! `nextflow gen --jsonl`: the images of a file of jobs, with the model loaded once.

use std::iter::Peekable;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::GenArgs;
use super::job_file::{Fault, Jobs, NO_OVERWRITING, Reading, Shard, Task};
use crate::cli::delivery::{Delivery, Line};
use crate::cli::request::Request;
use crate::cli::run::Load;
use crate::error::{Error, Kind, Result};
use crate::generate::cost::{Memory, Work};
use crate::generate::{Generator, Job, schedule};
use crate::io::output::Destination;
use crate::io::{input, output};
use crate::terminal;

/// Flags for files of jobs.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Batch")]
pub struct JobsArgs {
    /// Draw the jobs of a file, one JSON object per line: {"prompt": "a cat", "out": "cat.png",
    /// "seed": 7}; also id, negative, size, cfg, cfg_until, temperature, top_k, top_p, draft and
    /// refine. Flags are the defaults of all lines; `-` reads standard input as it comes
    #[arg(long, value_name = "FILE", conflicts_with_all = ["text", "from", "think", "output", "count", "preview", "refiner"])]
    pub jsonl: Option<PathBuf>,
    /// With --jsonl: skip jobs whose PNG exists and is complete
    #[arg(long, conflicts_with = "force")]
    pub resume: bool,
    /// With --jsonl: continue after a job fails
    #[arg(long)]
    pub keep_going: bool,
    /// With --jsonl: draw only part K of N, to split a file among processes
    #[arg(long, value_name = "K/N")]
    pub shard: Option<Shard>,
}

impl JobsArgs {
    /// Errors: usage, for flags that need `--jsonl`. (clap skips `requires` if the required flag
    /// conflicts with another one.)
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
    image: Drawn<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Drawn<'a> {
    Now(Line<'a>),
    Before { path: String, there: bool },
}

impl<'a> Done<'a> {
    fn drawn(task: &'a Task, line: Line<'a>) -> Self {
        Self { line: task.line, id: task.id.as_deref(), image: Drawn::Now(line) }
    }

    /// For an image that is skipped because it exists.
    fn there(task: &'a Task, folder: &Path) -> Self {
        let path = folder.join(task.out.as_deref().unwrap_or(Path::new(""))).display().to_string();
        Self { line: task.line, id: task.id.as_deref(), image: Drawn::Before { path, there: true } }
    }
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

/// The plan of `--dry-run`.
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
    /// Print the causes of errors.
    verbose: bool,
    count: usize,
}

impl Failures {
    /// Reports a failed job.
    ///
    /// Errors: what failed, if nothing is to go on.
    fn add(&mut self, Fault { line, id, error }: Fault) -> Result<()> {
        if !self.keep_going || error.kind == Kind::Interrupted {
            return Err(error);
        }
        self.count += 1;
        terminal::report(&error, self.verbose);
        let (id, hint, code) = (id.as_deref(), error.hint.as_deref(), error.exit_code());
        terminal::emit_json(&Failed { line, id, error: &error.message, hint, code }).map(drop)
    }

    /// Errors: some failed.
    fn end(&self, of: usize) -> Result<()> {
        match self.count {
            0 => Ok(()),
            n => Err(Error::new(Kind::Failure, format!("{n} of {of} jobs failed"))
                .hint("see the errors above; --resume draws the missing ones")),
        }
    }
}

/// Draws the jobs of `file`. All of a file is checked before the model loads; standard input is
/// read as it comes.
pub(super) fn run(args: &GenArgs, file: &Path) -> Result<()> {
    if let [_, second, ..] = args.draw.sampling.seed[..] {
        return Err(Error::usage("--jsonl takes one --seed, for the lines without one")
            .hint(format!("\"seed\": {second} in a line")));
    }
    let mut request = Request::of_jobs(&args.draw)?;
    args.set_passes(&mut request)?;
    args.set_features(&mut request)?;
    let usual = request.config.grids(request.size, &request.sampling)?;
    super::set_negative(args, &mut request, usual.len())?;
    let request = &request;
    let batch = super::batch(args, usize::MAX)?;
    if batch > 1 && input::is_stdin(file) {
        return Err(Error::usage("--batch would wait for several lines of standard input before it draws the first")
            .hint("--jsonl FILE --batch 4"));
    }
    let JobsArgs { resume, keep_going, shard, .. } = args.jobs;
    let name = input::shown(file);
    let folder = args.draw.output.out_dir.as_deref().unwrap_or(Path::new(""));
    let (flags, draft, force) = (&args.draw.sampling, args.draft, args.draw.output.force);
    let reading = Reading { name: &name, request, flags, draft, folder, resume, force, shard };
    let mut jobs = Jobs::new(reading, input::lines(file, "--jsonl FILE, or - for standard input")?);
    let mut failures = Failures { keep_going, verbose: args.draw.report.verbose, count: 0 };

    // Lines of a pipe are drawn as they come, unless they are only checked.
    let wait = !input::is_stdin(file) || args.draw.report.dry_run;
    let mut all: Vec<_> = if wait { jobs.by_ref().collect() } else { Vec::new() };
    let empty = || Error::usage(format!("{name} holds no job")).hint("one a line: {\"prompt\": \"a red apple\"}");
    if wait && jobs.seen() == 0 {
        return Err(empty());
    }
    let there = all.iter().flatten().filter(|task| task.there).count();
    if let Some(at) = all.iter().position(Result::is_err).filter(|_| !keep_going)
        && let Err(fault) = all.swap_remove(at)
    {
        return Err(fault.error);
    }
    let mut work = forecast(request, &all, batch.min(all.len().max(1)), &usual)?;
    if !wait {
        work.keep_text();
    }
    if args.draw.report.dry_run {
        return dry_run(args, request, &all, there, work);
    }
    if !args.draw.report.quiet {
        note_existing(&all, there, resume);
    }
    if wait && all.len() == there {
        return all.iter().flatten().try_for_each(|task| terminal::emit_json(&Done::there(task, folder)).map(drop));
    }
    let smaller = "a smaller --batch, --quant q8_0, or --quant q4_K";
    let load = Load { source: Some(&request.source), device: &request.device, peak: work.peak(), smaller };
    let mut run = load.start(args.draw.report.level(), (all.len() - there).max(1) as u64)?;
    let drawn = || all.iter().flatten().filter(|task| !task.there).map(|task| &task.job);
    let prompts: Vec<&str> =
        drawn().flat_map(|job| job.negative.iter().chain(Some(&job.prompt))).map(String::as_str).collect();
    let Request { source, config, device, weights, .. } = request;
    // Lines that are still to come may ask for it.
    let refine = drawn().any(|job| job.sampling.refine > 0) || !wait && config.refiner_steps().is_some();
    let features = args.text_features.as_deref();
    let load = || Generator::load(source, config, (device, *weights), &prompts, features, refine);
    let model = run.console.load(&request.model, load)?;
    if !wait {
        run.console.clear();
    }
    let mut delivery = Delivery::new(request, run, true);
    let tried = {
        let tasks = all.into_iter().chain(jobs.by_ref()).peekable();
        draw_all(&model, tasks, batch, &reading, &mut delivery, &mut failures)?
    };
    match tried {
        Some(_) if jobs.seen() == 0 => Err(empty()),
        Some(tried) => failures.end(tried),
        None => Ok(()), // The reader of our output has gone: nobody wants the rest.
    }
}

/// Checks the model, prints the plan, and reports the lines that cannot be drawn.
fn dry_run(args: &GenArgs, request: &Request, all: &[Result<Task, Fault>], there: usize, work: Memory) -> Result<()> {
    request.config.check(&request.source, args.text_features.as_deref())?;
    plan(request, all, there, work, args.draw.report.json)?;
    let faults = || all.iter().filter_map(|next| next.as_ref().err());
    faults().for_each(|fault| terminal::report(&fault.error, args.draw.report.verbose));
    match faults().count() {
        0 => Ok(()),
        n => Err(Error::new(Kind::Failure, format!("{n} of {} jobs cannot be drawn", all.len()))
            .hint("correct the lines above")),
    }
}

/// Notes how many images exist, and how many files are replaced because they are no whole PNG.
fn note_existing(all: &[Result<Task, Fault>], there: usize, resume: bool) {
    if there > 0 {
        terminal::note(&format!("({there} of {} images exist)", all.len()));
    }
    let broken = all.iter().flatten().filter(|task| task.replaces && resume).count();
    if broken > 0 {
        let what = if broken > 1 { format!("{broken} files are") } else { "1 file is".into() };
        terminal::note(&format!("({what} no whole PNG and will be replaced)"));
    }
}

/// Draws jobs as they come, up to `batch` at once. Returns how many there were; nothing if the
/// reader of stdout is gone.
fn draw_all(
    model: &Generator,
    mut tasks: Peekable<impl Iterator<Item = Result<Task, Fault>>>,
    batch: usize,
    reading: &Reading,
    delivery: &mut Delivery,
    failures: &mut Failures,
) -> Result<Option<usize>> {
    let mut tried = 0;
    while let Some(next) = tasks.next() {
        tried += 1;
        let first = match next {
            Ok(task) if task.there => {
                if terminal::emit_json(&Done::there(&task, reading.folder))?.is_break() {
                    return Ok(None);
                }
                continue;
            }
            Ok(task) => task,
            Err(fault) => {
                failures.add(fault)?;
                continue;
            }
        };
        let group = together(first, &mut tasks, batch);
        tried += group.len() - 1;
        if draw(model, &group, reading, delivery, failures)?.is_break() {
            return Ok(None);
        }
    }
    Ok(Some(tried))
}

/// A job and the following ones that can be drawn in the same pass, at most `batch`.
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

/// Draws some jobs as one batch and saves their images; `Break` if the reader of stdout is gone.
fn draw(
    model: &Generator,
    group: &[Task],
    &Reading { name, folder, resume, force, .. }: &Reading,
    delivery: &mut Delivery,
    failures: &mut Failures,
) -> Result<ControlFlow<()>> {
    let fault = |task: &Task, error: &Error| {
        let message = format!("line {} of {name}: {}", task.line, error.message);
        let cause = error.cause.as_ref().map(|cause| anyhow::anyhow!("{cause:#}"));
        let error = Error { kind: error.kind, message, hint: error.hint.clone(), cause };
        Fault { line: task.line, id: task.id.clone(), error }
    };
    let jobs: Vec<&Job> = group.iter().map(|task| &task.job).collect();
    let (images, took) = match delivery.draw(model, &jobs) {
        Ok(drawn) => drawn,
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(error) => {
            group.iter().try_for_each(|task| failures.add(fault(task, &error)))?;
            return Ok(ControlFlow::Continue(()));
        }
    };
    for (task, image) in group.iter().zip(&images) {
        let to = match &task.out {
            Some(out) => Destination::File { path: folder.join(out), force: task.replaces },
            None => Destination::Folder { path: folder.into(), force },
        };
        // A link may have come since the file was checked.
        let inside = task.out.as_ref().map_or(Ok(()), |out| output::check_inside(folder, &folder.join(out)));
        let flow = match inside.and_then(|()| delivery.save(&task.job, image, None, took, &to)) {
            Ok(saved) => terminal::emit_json(&Done::drawn(task, saved.line(&task.job, None)))?,
            Err(error) if error.kind == Kind::Interrupted => return Err(error),
            // Another process has drawn the same meanwhile.
            Err(_) if resume && is_file(&to) => terminal::emit_json(&Done::there(task, folder))?,
            Err(error) => {
                let error = if is_file(&to) { error.hint(NO_OVERWRITING) } else { error };
                failures.add(fault(task, &error))?;
                continue;
            }
        };
        if flow.is_break() {
            return Ok(flow);
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn is_file(place: &Destination) -> bool {
    matches!(place, Destination::File { path, .. } if path.is_file())
}

/// Memory for the largest job, or for what the flags say if jobs are still to come.
fn forecast(request: &Request, all: &[Result<Task, Fault>], images: usize, usual: &[(usize, usize)]) -> Result<Memory> {
    let tasks = || all.iter().flatten().filter(|task| !task.there);
    let largest = tasks().map(|task| &*task.job.scales).max_by_key(|scales| schedule::codes(scales));
    let sampling = tasks().map(|task| &task.job.sampling).max_by_key(|sampling| sampling.guided_scales(usual.len()));
    let text_tokens = tasks().map(|task| task.tokens).max().unwrap_or(0).max(request.tokens);
    let (scales, sampling) = (largest.unwrap_or(usual), sampling.unwrap_or(&request.sampling));
    let work = Work { scales, images, text_tokens, sampling, prompts: tasks().count() };
    request.config.memory(&request.source, request.weights, work, &request.device)
}

fn plan(request: &Request, all: &[Result<Task, Fault>], there: usize, memory: Memory, json: bool) -> Result<()> {
    let tasks = || all.iter().flatten().filter(|task| !task.there).map(|task| &task.job);
    let plan = Plan {
        model: &request.model,
        images: tasks().count(),
        there,
        faults: all.iter().filter(|next| next.is_err()).count(),
        codes: tasks().map(|job| schedule::codes(&job.scales)).sum(),
        passes: tasks().map(|job| job.sampling.all_passes(job.scales.len())).sum(),
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
