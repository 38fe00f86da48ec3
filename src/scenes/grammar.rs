//! Sentences from patterns.
//!
//! `(a|b|)` is one of its alternatives, which may nest. A pattern in `<>` is an instruction and one
//! in `[]` asks to be told something: both are put in one of many ways, "please ~", "can you ~?".
//! `PIC` and `COLOUR` are common words that have synonyms or spellings. `{x}` is a gap for [the
//! caller](super::wording::Voice::say) to fill.

/// Draws one of `n` alternatives.
pub(super) type Pick<'a> = &'a mut dyn FnMut(usize) -> usize;

/// Ways to put an instruction, the plain one first and most often.
const INSTRUCTIONS: &str = "(~|~|~|~|~|please ~|~(,|) please|(now|next,|ok,|okay,|then) ~|(can|could|would|will) you (|please )~?\
    |(can|could) you ~(, please| for me)?|(i want|i'd like|i would like|i need) you to ~|(just|let's|let us) ~\
    |(go ahead and|help me|try to|you should|you could) ~|(hi|hey|hello), ~\
    |(maybe|perhaps) ~|(be so kind as to|do me a favour and|your task is to|it is time to) ~|i (ask|would ask) you to ~)";
const INSTRUCTIONS_ZH: &str =
    "(~|~|~|~|请~|请~|请你~|帮我~|请帮我~|麻烦~|~吧|~，谢谢|现在~|能不能~？|可以~吗？|你能~吗？|我(想让|要|想要)你~)";
/// Ways to ask to be told something.
const REQUESTS: &str = "(~|~|~|please ~|~, please|(can|could|would|will) you (|please )~?|(now|just|ok,|hey,) ~\
    |(i want|i'd like|i would like|i need) you to ~)";
const REQUESTS_ZH: &str = "(~|~|请~|请你~|麻烦~|~吧|你能~吗？|可以~吗？)";

/// Words for which there are several.
const WORDS: [(&str, &str); 2] = [("PIC", "(picture|image|picture|photo|drawing|pic)"), ("COLOUR", "(colour|color)")];

/// A sentence of a pattern, in Chinese or English, with its gaps.
pub(super) fn sentence(pattern: &str, chinese: bool, pick: Pick) -> String {
    let openings = match (pattern.as_bytes().first(), chinese) {
        (Some(b'<'), false) => INSTRUCTIONS,
        (Some(b'<'), true) => INSTRUCTIONS_ZH,
        (Some(b'['), false) => REQUESTS,
        (Some(b'['), true) => REQUESTS_ZH,
        _ => return expand(pattern, pick),
    };
    let core = clause(pattern, pick);
    expand(openings, pick).replace('~', &core)
}

/// What an instruction is about, without an opening, to be joined with another.
pub(super) fn clause(pattern: &str, pick: Pick) -> String {
    expand(pattern.trim_matches(['<', '>', '[', ']']), pick)
}

/// Whether a pattern is an instruction, of which there is a [`clause`].
pub(super) fn is_instruction(pattern: &str) -> bool {
    pattern.starts_with('<')
}

/// A pattern with the alternatives of its [`WORDS`].
fn with_words(pattern: &str) -> String {
    WORDS.iter().fold(pattern.to_string(), |pattern, (word, group)| pattern.replace(word, group))
}

/// The alternatives of a group that has been opened, and what follows it.
fn alternatives(group: &str) -> (Vec<&str>, &str) {
    let (mut depth, mut from, mut all) = (0, 0, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth > 0 => depth -= 1,
            '|' | ')' if depth == 0 => {
                all.push(&group[from..i]);
                from = i + 1;
                if c == ')' {
                    break;
                }
            }
            _ => {}
        }
    }
    (all, &group[from..])
}

/// The pattern with one alternative of every group.
fn expand(pattern: &str, pick: Pick) -> String {
    let pattern = with_words(pattern);
    let (mut text, mut rest) = (String::new(), pattern.as_str());
    while let Some((before, group)) = rest.split_once('(') {
        let (alternatives, after) = alternatives(group);
        text.push_str(before);
        text.push_str(&expand(alternatives[pick(alternatives.len())], pick));
        rest = after;
    }
    text + rest
}

/// How many sentences a pattern has, without openings.
pub(super) fn variety(pattern: &str) -> usize {
    let mut product = 1;
    let mut rest = with_words(pattern);
    while let Some((_, group)) = rest.split_once('(') {
        let (alternatives, after) = alternatives(group);
        product *= alternatives.iter().map(|one| variety(one)).sum::<usize>();
        rest = after.to_string();
    }
    product
}

/// Every sentence of a pattern.
#[cfg(test)]
pub(super) fn sentences(pattern: &str) -> Vec<String> {
    let chinese = pattern.contains(|c: char| !c.is_ascii());
    let (mut all, mut choices) = (Vec::new(), Vec::<(usize, usize)>::new());
    loop {
        let mut at = 0;
        all.push(sentence(pattern, chinese, &mut |n| {
            if at == choices.len() {
                choices.push((0, n));
            }
            at += 1;
            choices[at - 1].0
        }));
        // The next, as an odometer goes on.
        while choices.last().is_some_and(|(chosen, n)| chosen + 1 == *n) {
            choices.pop();
        }
        match choices.last_mut() {
            Some((chosen, _)) => *chosen += 1,
            None => return all,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_makes_every_sentence_that_it_describes() {
        assert_eq!(sentences("a (b|(c|d) {e}|)f"), ["a bf", "a c {e}f", "a d {e}f", "a f"]);
        assert_eq!(sentences("the COLOUR"), ["the colour", "the color"]);
        assert_eq!(sentences("图(中|里)"), ["图中", "图里"]);
        assert_eq!(["a (b|(c|d) {e}|)f", "<go>", "a PIC (of|)"].map(variety), [4, 1, 12]);
        let put = sentences("<go>");
        for text in ["go", "please go", "could you please go?", "i'd like you to go", "let's go", "go, please"] {
            assert!(put.iter().any(|t| t == text), "{text}");
        }
        assert!(sentences("[tell me]").iter().all(|t| !t.contains("let")), "one does not propose to be told");
    }

    #[test]
    fn the_first_alternatives_are_the_canonical_sentence() {
        assert_eq!(sentence("<(remove|delete) {o}(| please)>", false, &mut |_| 0), "remove {o}");
        // The language is not to be told from a pattern of gaps alone.
        assert_eq!(sentence("<{v}{o}>", true, &mut |n| n - 1), "我想要你{v}{o}");
    }
}
