//! The conversation of `nextflow chat`: lines in, replies out, and commands that begin with a
//! slash.

use std::path::Path;

use super::host::{self, Ask, Host};
use super::lines::{self, Lines};
use super::saved;
use crate::chat::{ChatModel, FinishReason, Picture, Role, Session};
use crate::error::{Error, Kind, Result};
use crate::generate::Size;
use crate::io::input;
use crate::terminal;

const HELP: &str = "\
/image FILE    attach an image to the next message; a file can be dropped on the terminal
/gen TEXT      draw an image
/edit TEXT     edit the last image, or the one named by $N in TEXT
/size W:H      size of drawn images: WxH in pixels, W:H as a ratio, or auto
/regen         replace the last answer with another one
/seed N        set the random seed
/undo          remove the last question and its answer
/clear         remove everything
/system TEXT   set the system prompt; without TEXT print it
/show          print the conversation, with its images $1, $2, ...
/save FILE     write the conversation to a file; /load FILE continues from it
/exit          leave (or Ctrl-D); Ctrl-C stops a reply
A line that ends in \\ continues on the next one; \"\"\" starts and ends a message of several lines.";

/// A running conversation.
pub(super) struct Repl<'a> {
    model: &'a ChatModel,
    session: Session<'a>,
    host: Host,
    /// Images for the next message.
    pictures: Vec<Picture>,
    /// What the last message asked for; unknown after `/load`.
    asked: Option<Ask>,
    lines: Lines,
    quiet: bool,
    /// An error was reported: decides the exit code if standard input is a pipe.
    failed: bool,
}

impl<'a> Repl<'a> {
    pub fn new(
        model: &'a ChatModel,
        session: Session<'a>,
        host: Host,
        pictures: Vec<Picture>,
        quiet: bool,
    ) -> Result<Self> {
        let lines = Lines::open()?;
        Ok(Self { model, session, host, pictures, asked: None, lines, quiet, failed: false })
    }

    /// One command, as it is typed. Ctrl-C ends it with an error.
    pub fn once(mut self, text: &str) -> Result<()> {
        self.command(text.trim_start_matches('/'))?;
        if self.host.stop.check().is_break() { Err(terminal::interrupted()) } else { Ok(()) }
    }

    /// Until the user leaves.
    pub fn run(mut self) -> Result<()> {
        let terminal = self.lines.is_terminal();
        if terminal && !self.quiet {
            terminal::note("/help lists the commands; /exit leaves");
        }
        loop {
            self.host.stop.waiting();
            let message = self.lines.message(self.pictures.len());
            self.host.stop.speaking();
            let outcome = match message {
                Ok(None) => break,
                Ok(Some(text)) if text.is_empty() => continue,
                Ok(Some(text)) => match text.strip_prefix('/') {
                    Some(command) if command.trim_end() == "exit" => break,
                    Some(command) => self.command(command),
                    None => self.say(&text, Ask::Answer),
                },
                // Nothing more can be read.
                Err(error) if error.kind == Kind::Failure => {
                    self.lines.close();
                    return Err(error);
                }
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                self.failed = true;
                match error.kind {
                    Kind::Interrupted => terminal::note("(stopped before the first token; nothing was added)"),
                    _ => terminal::report(&error, self.host.verbose),
                }
            }
        }
        self.lines.close();
        match self.failed && !terminal {
            true => Err(Error::new(Kind::Failure, "a part of the conversation failed").hint("see the errors above")),
            false => Ok(()),
        }
    }

    /// Sends a message, with the attached images and those that `$N` names.
    fn say(&mut self, text: &str, ask: Ask) -> Result<()> {
        let (text, named) = self.named(text)?;
        if text.is_empty() && !named.is_empty() {
            return Err(Error::usage("there is no text beside the image").hint("$1 what is it?"));
        }
        let text = lines::check(text.as_bytes())?;
        let pictures = self.pictures.iter().cloned().chain(named).collect();
        self.ask(pictures, &text, ask)
    }

    /// Takes `$N` out of a text: the images so far that it names. `\$N` is no name.
    fn named(&self, text: &str) -> Result<(String, Vec<Picture>)> {
        let mut pictures = Vec::new();
        let mut words = Vec::new();
        let mut gallery = self.session.gallery();
        let said = gallery.len();
        // Those that wait for this message may be named as well; they go with it anyway.
        gallery.extend(&self.pictures);
        for word in text.split_inclusive(char::is_whitespace) {
            let number = word.trim_end().trim_end_matches([',', '.', ':', ';', '?', '!']).strip_prefix('$');
            let digits = |text: &&str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            if let Some(literal) = word.strip_prefix('\\').filter(|rest| rest.starts_with('$')) {
                words.push(literal);
                continue;
            }
            match number.filter(digits).map(|digits| digits.parse::<usize>().unwrap_or(usize::MAX)) {
                None => words.push(word),
                Some(n) if (said..gallery.len()).contains(&n.wrapping_sub(1)) => {}
                Some(n) => {
                    let picture = n.checked_sub(1).and_then(|i| gallery.get(i)).ok_or_else(|| {
                        let images = match gallery.len() {
                            0 => "there are none yet".into(),
                            1 => "there is one image".into(),
                            n => format!("there are {n} images"),
                        };
                        Error::usage(format!("{} is not an image: {images}", word.trim()))
                            .hint("/show lists them; \\$ is a plain $")
                    });
                    pictures.push((*picture?).clone());
                }
            }
        }
        Ok((words.concat().trim().to_string(), pictures))
    }

    fn ask(&mut self, pictures: Vec<Picture>, text: &str, ask: Ask) -> Result<()> {
        let reply = self.host.say(&mut self.session, pictures, text, ask)?;
        self.pictures.clear();
        self.asked = Some(ask);
        if reply.ending == FinishReason::Interrupted && !self.quiet {
            terminal::note("(stopped)");
        }
        Ok(())
    }

    fn command(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let quiet = self.quiet;
        let tell = |text: &str| {
            if !quiet {
                terminal::note(text);
            }
        };
        match (name, rest) {
            ("help" | "regen" | "undo" | "clear" | "show" | "exit", more) if !more.is_empty() => {
                return Err(Error::usage(format!("/{name} takes no argument")).hint(format!("/{name}")));
            }
            ("help", _) => HELP.lines().for_each(terminal::note),
            ("image", "") => return Err(Error::usage("/image needs a file").hint("/image photo.jpg")),
            ("image", files) => {
                // All or none.
                let files = input::dropped(files);
                let pictures = files.iter().map(|file| host::picture(self.model, file)).collect::<Result<Vec<_>>>()?;
                for picture in pictures {
                    tell(&format!("{} is attached to the next message: {} tokens", picture.name, picture.tokens()));
                    self.pictures.push(picture);
                }
            }
            ("gen" | "edit", "") => {
                return Err(Error::usage(format!("/{name} needs text")).hint("/gen a blue star, /edit make it red"));
            }
            ("gen", text) => self.say(text, Ask::Image)?,
            ("edit", _) if self.pictures.is_empty() && self.session.pictures().next().is_none() => {
                return Err(Error::usage("there is no image to edit yet").hint("/image photo.jpg, or /gen a blue star"));
            }
            ("edit", text) => self.say(text, Ask::Edit)?,
            ("regen", _) => self.regenerate()?,
            ("seed", seed) => {
                let bad = |_| Error::usage(format!("{seed:?} is not a seed")).hint("/seed 7");
                self.host.options.seed = seed.parse().map_err(bad)?;
            }
            ("size", "") => return Err(Error::usage("/size needs a size").hint("/size 16:9")),
            ("size", text) => {
                let config = self.model.config().drawing.as_ref().ok_or_else(|| self.model.draws_nothing())?;
                let as_typed = |text: String| text.replace("--size", "/size");
                let here = |e: Error| Error { message: as_typed(e.message), hint: e.hint.map(as_typed), ..e };
                let size: Size = text.parse().map_err(here)?;
                size.grids(config).map_err(here)?;
                self.host.size = size;
            }
            ("undo", _) => {
                self.asked = None;
                match self.session.undo() {
                    Some(_) => tell("removed the last question and its answer"),
                    None => tell("the conversation is empty"),
                }
            }
            ("clear", _) => {
                self.session.clear();
                self.pictures.clear();
                tell("removed everything");
            }
            ("system", "") => terminal::note(self.session.system()),
            ("system", text) => self.session.set_system(text),
            ("show", _) => self.show(),
            ("save" | "load", "") => {
                return Err(Error::usage(format!("/{name} needs a file")).hint(format!("/{name} a.json")));
            }
            ("save", file) => {
                saved::save(&self.session, Path::new(file))?;
                tell(&format!("saved to {file}"));
            }
            ("load", file) => {
                saved::load(self.model, &mut self.session, Path::new(file))?;
                self.asked = None;
                tell(&format!("{} messages from {file}", self.session.turns().len()));
            }
            // A command by itself has nothing to leave.
            ("exit", _) => {}
            _ => return Err(Error::usage(format!("there is no command /{name}")).hint("/help")),
        }
        Ok(())
    }

    /// Another answer to the last question, with the next seed.
    fn regenerate(&mut self) -> Result<()> {
        let turns = self.session.turns().to_vec();
        let Some(question) = self.session.undo() else {
            return Err(Error::usage("the conversation is empty").hint("/gen a red apple"));
        };
        let kept = self.session.turns().len();
        let images = turns.last().map_or(0, |answer| answer.pictures().count());
        let ask = self.asked.unwrap_or(if images == 1 { Ask::Edit } else { Ask::Answer });
        self.host.options.seed = self.host.options.seed.wrapping_add(1);
        // Images that wait are for the next message.
        let waiting = std::mem::take(&mut self.pictures);
        let outcome = self.ask(question.pictures().cloned().collect(), &question.text(), ask);
        self.pictures = waiting;
        if self.session.turns().len() == kept {
            // Nothing was added: the old answer stays.
            turns[kept..].iter().for_each(|turn| self.session.push(turn.role, turn.parts.clone()));
        }
        outcome
    }

    fn show(&self) {
        let gallery = self.session.gallery();
        terminal::note(&format!("system: {}", self.session.system()));
        for turn in self.session.turns() {
            let role = match turn.role {
                Role::User => "you",
                Role::Assistant => "model",
            };
            for part in &turn.parts {
                if let Some(picture) = part.image() {
                    let number = gallery.iter().take_while(|known| known.id() != picture.id()).count() + 1;
                    terminal::note(&format!("{role}: [${number} {}]", picture.name));
                }
                part.text().unwrap_or_default().lines().for_each(|line| terminal::note(&format!("{role}: {line}")));
            }
        }
    }
}
