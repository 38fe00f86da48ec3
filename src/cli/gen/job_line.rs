//! A line of a file of jobs: its keys, and errors about it in plain words.

use std::collections::HashSet;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;

use crate::cli::per_scale::PerScale;
use crate::error::{Error, Result};

/// An example of a line.
pub(super) const EXAMPLE: &str = r#"{"prompt": "a red apple", "out": "apple.png", "seed": 7}"#;

/// The values of a line; flags fill in the others.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub prompt: String,
    pub negative: Option<String>,
    pub id: Option<String>,
    pub out: Option<String>,
    pub seed: Option<u64>,
    pub size: Option<String>,
    pub cfg: Option<PerScale>,
    pub cfg_until: Option<usize>,
    pub temperature: Option<PerScale>,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub draft: Option<usize>,
}

const KEYS: [&str; 12] =
    ["prompt", "out", "id", "seed", "negative", "size", "cfg", "cfg_until", "temperature", "top_k", "top_p", "draft"];

impl Line {
    /// The job of a line, without blanks around it.
    ///
    /// Errors: usage, for anything but a JSON object, and for unknown keys and bad values.
    pub fn parse(line: &[u8]) -> Result<Self> {
        let hint = || format!("one job a line: {EXAMPLE}");
        if let Err(e) = std::str::from_utf8(line) {
            return Err(Error::usage(format!("it is not UTF-8 (byte {})", e.valid_up_to()))
                .hint("iconv -f WINDOWS-1252 -t UTF-8 FILE > jobs.jsonl, or with the encoding that it has"));
        }
        match line {
            [b'{', ..] => {}
            [b'[', ..] => {
                return Err(Error::usage("it begins a JSON array, but jobs are one object a line")
                    .hint("jq -c '.[]' FILE > jobs.jsonl"));
            }
            [b'#', ..] | [b'/', b'/' | b'*', ..] => {
                return Err(Error::usage("it is a comment, which JSON does not have").hint("leave the line out"));
            }
            [first, ..] if *first != b'"' && line.contains(&b',') => {
                return Err(Error::usage("it is not a JSON object, but looks like CSV")
                    .hint("mlr --icsv --ojsonl cat FILE > jobs.jsonl"));
            }
            _ => return Err(Error::usage("it is not a JSON object").hint(hint())),
        }
        let line: Self = serde_json::from_slice(line).map_err(|e| unreadable(&e, line))?;
        match line.prompt.is_empty() {
            true => Err(Error::usage("it has no prompt: the prompt is missing or empty").hint(hint())),
            false => Ok(line),
        }
    }

    /// Sets the value of `key`; returns what is wrong with it otherwise.
    fn set(&mut self, key: &str, value: Value) -> Result<(), String> {
        match key {
            "prompt" => self.prompt = text(key, value)?,
            "negative" => self.negative = Some(text(key, value)?),
            "out" => self.out = Some(text(key, value)?),
            "size" => self.size = Some(text(key, value)?),
            // Tables number their rows, and some write 7.0.
            "id" if value.is_number() => {
                let whole = whole(key, &value, u64::MAX).map(|n| n.to_string());
                self.id = Some(whole.unwrap_or_else(|_| value.to_string()));
            }
            "id" => self.id = Some(text(key, value)?),
            "seed" => self.seed = Some(whole(key, &value, u64::MAX)?),
            "cfg_until" => self.cfg_until = Some(small(key, &value)?),
            "top_k" => self.top_k = Some(small(key, &value)?),
            "draft" => self.draft = Some(small(key, &value)?),
            "cfg" => self.cfg = Some(numbers(key, value)?),
            "temperature" => self.temperature = Some(numbers(key, value)?),
            _ => self.top_p = Some(number(key, &value)?),
        }
        Ok(())
    }
}

/// The beginning of a value, as in the line.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn text(key: &str, value: Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(format!("{key} is text in double quotes, not {}", shown(&other))),
    }
}

/// A number, or one for every scale.
fn numbers(key: &str, value: Value) -> Result<PerScale, String> {
    if !value.is_array() {
        return number(key, &value).map(|number| PerScale::of(number, &[]));
    }
    let wrong = format!("{key} is a number, or a list of one for every scale, not {}", shown(&value));
    serde_json::from_value(value).map_err(|_| wrong)
}

fn number(key: &str, value: &Value) -> Result<f64, String> {
    value.as_f64().ok_or_else(|| format!("{key} is a number, not {}", shown(value)))
}

/// A whole number, which may have a point or an exponent as in 7.0 and 1e3.
fn whole(key: &str, value: &Value, most: u64) -> Result<u64, String> {
    let of_float = |x: f64| (x >= 0.0 && x < 2f64.powi(64) && x.fract() == 0.0).then_some(x as u64);
    let number = value.as_u64().or_else(|| value.as_f64().and_then(of_float)).filter(|n| *n <= most);
    number.ok_or_else(|| format!("{key} is a whole number from 0 to {most}, not {}", shown(value)))
}

fn small(key: &str, value: &Value) -> Result<usize, String> {
    whole(key, value, u32::MAX.into()).map(|n| n as usize)
}

impl<'de> Deserialize<'de> for Line {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Line;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Line, A::Error> {
                let (mut line, mut seen) = (Line::default(), HashSet::new());
                while let Some(key) = map.next_key::<String>()? {
                    if !KEYS.contains(&&*key) {
                        let meant = key.to_lowercase().replace('-', "_");
                        let list = match KEYS.contains(&&*meant) {
                            true => format!("it is {meant}"),
                            false => format!("there are {}", KEYS.join(", ")),
                        };
                        return Err(de::Error::custom(format!("there is no key {key:?}; {list}")));
                    }
                    let value: Value = map.next_value()?;
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format!("{key} is there twice")));
                    }
                    if !value.is_null() {
                        line.set(&key, value).map_err(de::Error::custom)?;
                    }
                }
                Ok(line)
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

/// The error of a line that is no job.
fn unreadable(e: &serde_json::Error, line: &[u8]) -> Error {
    let text = e.to_string();
    let what = text.rsplit_once(" at line ").map_or(&*text, |(what, _)| what);
    let place = if e.column() > 0 { format!(" (column {})", e.column()) } else { String::new() };
    let usage = |what: &str, hint: &str| Error::usage(format!("{what}{place}")).hint(hint);
    let example = format!("one job a line: {EXAMPLE}");
    if e.is_eof() {
        let hint = "jq -c . FILE > jobs.jsonl, if each job is spread over several lines";
        return usage("the line ends before its JSON does: a quote or a brace is missing", hint);
    }
    if !e.is_syntax() {
        return usage(what, &example);
    }
    // The column is that of a character that nothing could be made of, or of the one before it.
    let at = e.column().saturating_sub(1).min(line.len());
    let near = |words: &[&'static str]| {
        let begins = |word: &str, at| line.get(at..).is_some_and(|rest| rest.starts_with(word.as_bytes()));
        let found = words.iter().find(|word| (at.saturating_sub(1)..=at).any(|at| begins(word, at)));
        found.copied()
    };
    if let Some(word) = near(&["-Infinity", "Infinity", "NaN", "nan", "None", "undefined"]) {
        return usage(&format!("{word} is not JSON"), "leave the key out, or write null");
    }
    if let Some(word) = near(&["True", "False"]) {
        return usage(&format!("{word} is not JSON"), &example);
    }
    if near(&["//", "/*", "#"]).is_some() {
        return usage("JSON has no comments", &example);
    }
    if near(&["'", "\u{201c}", "\u{201d}", "\u{2018}"]).is_some() || what == "key must be a string" {
        return usage("keys and text stand in straight double quotes", &example);
    }
    match what {
        "trailing characters" => usage("there is more behind the job", "one job a line, and nothing else in it"),
        "trailing comma" => usage("there is a comma behind the last value", &example),
        _ if what.starts_with("control character") => usage("a text holds a control character", "write \\n, \\t"),
        _ => usage(what, &example),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_tables_write() {
        let line = Line::parse(
            br#"{"prompt": "x", "seed": 7.0, "top_k": 1e3, "id": 12, "cfg": 3, "negative": null, "draft": 0.0}"#,
        );
        let line = line.unwrap();
        assert_eq!((line.seed, line.top_k, line.id.as_deref()), (Some(7), Some(1000), Some("12")));
        assert_eq!(line.cfg, Some(PerScale::of(3.0, &[])));
        assert_eq!((line.negative, line.draft, line.out), (None, Some(0), None));
        let id = |id: &str| Line::parse(format!(r#"{{"prompt": "x", "id": {id}}}"#).as_bytes()).unwrap().id.unwrap();
        assert_eq!([id("7.0"), id("2.5"), id("-3"), id("\"a\"")], ["7", "2.5", "-3", "a"]);
        let seed = |seed: &str| Line::parse(format!(r#"{{"prompt": "x", "seed": {seed}}}"#).as_bytes());
        assert_eq!(seed("18446744073709551615").unwrap().seed, Some(u64::MAX));
        for bad in ["18446744073709551616", "-1", "1.5", "true", "\"7\"", "[7]", "{}", "-0.5"] {
            let error = seed(bad).unwrap_err();
            let words = format!("seed is a whole number from 0 to {}, not ", u64::MAX);
            assert!(error.message.starts_with(&words) && error.message.contains("(column "), "{error}");
        }
    }

    #[test]
    fn what_is_no_job_is_said_in_words() {
        for (line, part) in [
            (r#"{"prompt": "x""#, "the line ends before its JSON does"),
            (r#"{"prompt": "x"#, "the line ends before its JSON does"),
            (r#"{"prompt": 12}"#, "prompt is text in double quotes, not 12 (column 14)"),
            (r#"{"prompt": null}"#, "it has no prompt"),
            (r#"{"seed": 1}"#, "it has no prompt"),
            (r#"{"prompt": "x", "Seed": 1}"#, "there is no key \"Seed\"; it is seed"),
            (r#"{"prompt": "x", "colour": 1}"#, "there is no key \"colour\"; there are prompt, out"),
            (r#"{"prompt": "x", "seed": 1, "seed": 2}"#, "seed is there twice"),
            (r#"{"prompt": "x", "cfg": "3"}"#, "cfg is a number, not \"3\""),
            (r#"{"prompt": "x", "cfg": NaN}"#, "NaN is not JSON"),
            (r#"{"prompt": "x", "cfg": Infinity}"#, "Infinity is not JSON"),
            (r#"{"prompt": "x", "cfg": -Infinity}"#, "-Infinity is not JSON"),
            (r#"{"prompt": "x", "cfg": None}"#, "None is not JSON"),
            (r#"{"prompt": "x",}"#, "there is a comma behind the last value"),
            (r#"{"prompt": "x"} {"prompt": "y"}"#, "there is more behind the job"),
            (r#"{"prompt": "x"} // y"#, "JSON has no comments"),
            (r#"{"prompt": "x", /* y */ "seed": 1}"#, "JSON has no comments"),
            ("{'prompt': 'x'}", "straight double quotes"),
            ("{prompt: \"x\"}", "straight double quotes"),
            ("{\u{201c}prompt\u{201d}: \"x\"}", "straight double quotes"),
            ("# x", "a comment"),
            ("// x", "a comment"),
            (r#"["x", "y"]"#, "a JSON array"),
            ("[", "a JSON array"),
            ("prompt,seed", "looks like CSV"),
            ("a cat", "it is not a JSON object"),
            (r#""a cat""#, "it is not a JSON object"),
        ] {
            let error = Line::parse(line.as_bytes()).unwrap_err();
            assert!(error.message.contains(part) && error.hint.is_some(), "{line}: {error}");
            for word in ["u64", "f64", "usize", "`", "expected", "EOF", "invalid type"] {
                assert!(!error.message.contains(word), "{line}: {error}");
            }
        }
    }
}
