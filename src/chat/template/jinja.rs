//! A checkpoint's own chat template, in Jinja, rendered as transformers renders it.
//!
//! Control tokens may come from the template alone. It is rendered twice: once with a mark in the
//! place of every text, which shows where the template's own words are, and once with the texts, in
//! which words of control tokens are replaced by marks. If the second rendering has other control
//! tokens than the first, a text has reached the structure of the conversation, and the
//! conversation is refused.

mod stretches;
#[cfg(test)]
mod tests;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat;

use super::{Part, Piece, Pieces, Role};
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::text::Text;
use stretches::{Controls, Mark, Said, Stretch, Writer};

/// Limit of one rendering: about this many instructions, or 64 times as many bytes.
const FUEL: u64 = 1 << 20;
/// The longest rendering, in bytes.
const MAX_OUTPUT: usize = 16 << 20;
/// The longest template, in bytes.
const MAX_TEMPLATE: usize = 1 << 20;
/// The name of the template in its environment.
const NAME: &str = "chat";
/// A text that a template is tried with.
const PROBE: &str = "zq7";
/// The placeholder of an image in the output of a template.
const IMAGE: &str = "<|image_pad|>";
const VISION: (&str, &str) = ("<|vision_start|>", "<|vision_end|>");

/// A template that compiles.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The file that it is in.
    file: &'static str,
    /// Beginnings and ends of sequences, as the tokenizer's config names them.
    names: Value,
    shape: Shape,
}

/// In which forms a template prints contents.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// A content without images is a list of parts, as one with images is, not a string.
    lists: bool,
    /// Images stand in the string as the words of their tokens: the template knows no lists.
    inline: bool,
}

/// One message for the template.
struct Message<'a, I> {
    role: &'static str,
    parts: Vec<Content<'a, I>>,
}

enum Content<'a, I> {
    /// A text, the tokens that it is if they are known, and whether the model may have written it.
    Text(&'a str, Option<&'a [u32]>, bool),
    Image(&'a I),
}

impl ChatTemplate {
    /// The template of a folder, in the order in which transformers looks for it, or why it cannot
    /// be used, as a sentence for the user.
    ///
    /// Errors: a file that is broken.
    pub fn read(source: &Source) -> Result<Option<Result<Self, String>>> {
        let names = if source.has_file(TOKENIZER) { source.read_json(TOKENIZER)? } else { serde_json::Value::Null };
        let Some((file, template)) = find(source, &names)? else { return Ok(None) };
        let unused = |why: String| format!("the chat template in {file} of {source} is not used: {why}");
        Ok(Some(Self::new(file, template, &names).map_err(unused)))
    }

    fn new(file: &'static str, template: String, names: &serde_json::Value) -> Result<Self, String> {
        if template.len() > MAX_TEMPLATE {
            return Err(format!("it has more than {MAX_TEMPLATE} bytes"));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| e.to_string())?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, without_generation(template)).map_err(|e| e.to_string())?;
        let name = |key: &str| match &names[key] {
            serde_json::Value::Object(token) => token["content"].as_str().map(Value::from),
            value => value.as_str().map(Value::from),
        };
        let names =
            ["bos_token", "eos_token", "pad_token", "unk_token"].map(|key| (key, name(key).unwrap_or_default()));
        let shape = Shape { lists: false, inline: false };
        Ok(Self { environment, file, names: names.into_iter().collect(), shape })
    }

    /// The template for a vocabulary, once it has shown that it prints texts and images; else why
    /// it cannot be used, as a sentence for the user.
    pub fn fitted(mut self, text: &Text) -> Result<Self, String> {
        let shapes = [(false, false), (true, false), (false, true)];
        let parts = [Part::Image(()), Part::Text(PROBE.into())];
        let mut why = format!("the chat template in {} prints no texts, or no images, of a conversation", self.file);
        for (lists, inline) in shapes {
            self.shape = Shape { lists, inline };
            let probe = |parts: &[Part<()>]| {
                let pieces = self.render(text, "", [(Role::User, parts)], &[])?;
                let words =
                    pieces.iter().filter_map(|(piece, _)| if let Piece::Tokens(w) = piece { Some(w) } else { None });
                let words = words.map(|ids| text.decode(ids)).collect::<Result<Vec<_>>>()?;
                let printed = words.iter().any(|words| words.contains(PROBE));
                let images = pieces.iter().filter(|(piece, _)| matches!(piece, Piece::Image(()))).count();
                Ok::<_, Error>(printed && images == parts.len() - 1)
            };
            match (probe(&parts[1..]), probe(&parts)) {
                (Ok(true), Ok(true)) => return Ok(self),
                (Err(e), _) => why = e.message,
                _ => {}
            }
        }
        Err(format!("{why}; it is not used"))
    }

    /// A conversation in the template's form; as [`super::Template::render`].
    pub(super) fn render<'a, I>(
        &self,
        text: &Text,
        system: &'a str,
        turns: impl IntoIterator<Item = (Role, &'a [Part<I>])>,
        reply: &'a [Part<I>],
    ) -> Result<Pieces<'a, I>> {
        let messages = messages(system, turns, reply);
        let opens = messages.last().is_some_and(|message| message.role == "user");
        let controls = Controls::new(text);
        // With the tokens of each where they are known, and whether the model may have said it.
        let texts: Vec<Said> = messages.iter().flat_map(Message::contents).collect();
        let mark = Mark::unused(&texts)?;
        // With marks for texts.
        let mut count = 0;
        let marked = self.print(&messages, opens, |_, _| {
            count += 1;
            mark.text(count - 1)
        })?;
        let marked = controls.cut(&marked, &mark);
        // With the texts, in which marks are numbered from the first that stands for no text.
        let printed =
            self.print(&messages, opens, |words, spoken| controls.escaped(words, spoken, &mark, texts.len()))?;
        let whole: String = marked
            .iter()
            .map(|stretch| match stretch {
                Stretch::Text(words) => (*words).into(),
                Stretch::Control(id) => controls.word(*id).to_string(),
                Stretch::Mark(i) => texts.get(*i).map_or_else(
                    || mark.text(*i),
                    |(words, _, spoken)| controls.escaped(words, *spoken, &mark, texts.len()),
                ),
            })
            .collect();
        let images = messages.iter().rev().flat_map(|m| m.parts.iter().rev()).filter_map(Content::image).collect();
        let mut writer = Writer::new(text, &controls, images);
        if whole == printed {
            for stretch in marked {
                match stretch {
                    Stretch::Mark(i) => writer.text(*texts.get(i).ok_or_else(|| self.forged())?)?,
                    other => writer.stretch(other)?,
                }
            }
        } else {
            let printed = controls.cut(&printed, &mark);
            if !controls.structure(&marked).eq(controls.structure(&printed)) {
                let message =
                    format!("the chat template in {} lets the text of a message act as control tokens", self.file);
                return Err(Error::usage(message).hint("leave out text like <|im_start|> in the message"));
            }
            for stretch in printed {
                match stretch {
                    Stretch::Mark(i) => {
                        let word = i.checked_sub(texts.len()).and_then(|i| controls.words.get(i));
                        writer.open += word.ok_or_else(|| self.forged())?.0;
                    }
                    other => writer.stretch(other)?,
                }
            }
        }
        writer.finish(self.file)
    }

    /// The error of a template that prints marks itself.
    fn forged(&self) -> Error {
        Error::usage(format!("the chat template in {} prints characters of private use", self.file))
            .hint("take the file out of the folder")
    }

    /// The output for messages whose texts are what `print` makes of them.
    fn print<I>(
        &self,
        messages: &[Message<I>],
        opens: bool,
        mut print: impl FnMut(&str, bool) -> String,
    ) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| {
                let content = message.value(self.shape, &mut print);
                context! { role => message.role, content => content }
            })
            .collect();
        let refuse = |e: minijinja::Error| {
            let what = e.detail().map_or_else(|| e.to_string(), str::to_string);
            Error::usage(format!("the chat template in {} does not take this conversation: {what}", self.file))
                .hint("/undo, /clear, or another --system")
        };
        let template = self.environment.get_template(NAME).map_err(refuse)?;
        // None, as transformers passes them: templates tell it from undefined.
        let none = Value::from(());
        let context = context! {
            messages, add_generation_prompt => opens, tools => none.clone(), documents => none, ..self.names.clone()
        };
        let mut output = Bounded(Vec::new());
        template.render_captured_to(context, &mut output).map_err(refuse)?;
        String::from_utf8(output.0).map_err(|e| Error::usage(e.to_string()))
    }
}

/// The tokenizer's config, which names tokens and may hold the template.
const TOKENIZER: &str = "tokenizer_config.json";

/// The template, and the file that it is in.
fn find(source: &Source, names: &serde_json::Value) -> Result<Option<(&'static str, String)>> {
    const JINJA: &str = "chat_template.jinja";
    if source.has_file(JINJA) {
        return Ok(Some((JINJA, source.read_text(JINJA)?)));
    }
    for file in ["chat_template.json", "processor_config.json"] {
        let fields = if source.has_file(file) { source.read_json(file)? } else { serde_json::Value::Null };
        if let Some(template) = named(&fields["chat_template"]) {
            return Ok(Some((file, template)));
        }
    }
    Ok(named(&names["chat_template"]).map(|template| (TOKENIZER, template)))
}

/// A template, or the one called `default` of several.
fn named(value: &serde_json::Value) -> Option<String> {
    match value {
        serde_json::Value::Array(all) => {
            all.iter().find(|one| one["name"] == "default")?["template"].as_str().map(str::to_string)
        }
        value => value["default"].as_str().or(value.as_str()).map(str::to_string),
    }
}

/// transformers marks what the model says by `{% generation %}`, for training alone; blocks that
/// are always taken have no effect either.
fn without_generation(mut template: String) -> String {
    for (tag, block) in [("generation", "if true"), ("endgeneration", "endif")] {
        for (open, close) in [("{% ", " %}"), ("{%- ", " %}"), ("{% ", " -%}"), ("{%- ", " -%}")] {
            template = template.replace(&format!("{open}{tag}{close}"), &format!("{open}{block}{close}"));
        }
    }
    template
}

/// The messages of a conversation.
fn messages<'a, I>(
    system: &'a str,
    turns: impl IntoIterator<Item = (Role, &'a [Part<I>])>,
    reply: &'a [Part<I>],
) -> Vec<Message<'a, I>> {
    let first = Message { role: "system", parts: vec![Content::Text(system, None, false)] };
    let mut messages: Vec<_> = (!system.is_empty()).then_some(first).into_iter().collect();
    let turns = turns.into_iter().chain((!reply.is_empty()).then_some((Role::Assistant, reply)));
    messages.extend(turns.map(|(role, parts)| {
        let spoken = role == Role::Assistant;
        let content = |part: &'a Part<I>| match part {
            Part::Text(words) => Content::Text(words, None, spoken),
            Part::Drawn(words, ids) => Content::Text(words, Some(ids), spoken),
            Part::Image(image) => Content::Image(image),
        };
        Message { role: if spoken { "assistant" } else { "user" }, parts: parts.iter().map(content).collect() }
    }));
    messages
}

impl<'a, I> Content<'a, I> {
    fn image(&self) -> Option<&'a I> {
        if let Self::Image(image) = self { Some(image) } else { None }
    }
}

impl<'a, I> Message<'a, I> {
    fn contents(&self) -> impl Iterator<Item = Said<'a>> + '_ {
        self.parts.iter().filter_map(|part| match part {
            Content::Text(words, ids, spoken) => Some((*words, *ids, *spoken)),
            Content::Image(_) => None,
        })
    }

    /// The content as the template gets it.
    fn value(&self, shape: Shape, print: &mut impl FnMut(&str, bool) -> String) -> Value {
        let images = self.parts.iter().any(|part| part.image().is_some());
        if shape.lists || images && !shape.inline {
            let parts = self.parts.iter().map(|part| match part {
                Content::Text(words, _, spoken) => context! { type => "text", text => print(words, *spoken) },
                Content::Image(_) => context! { type => "image" },
            });
            return parts.collect();
        }
        let parts = self.parts.iter().map(|part| match part {
            Content::Text(words, _, spoken) => print(words, *spoken),
            Content::Image(_) => format!("{}{IMAGE}{}", VISION.0, VISION.1),
        });
        parts.collect::<String>().into()
    }
}

/// Output that ends at [`MAX_OUTPUT`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::Error::other("the output is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
