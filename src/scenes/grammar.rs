//! Sentences from patterns.
//!
//! `(a|b|)` is one of its alternatives, which may nest. A pattern in `<>` is an instruction and one in `[]` asks to be told
//! something: both are put in one of many ways, "please ~", "can you ~?". `PIC` and `COLOUR` are common words that have
//! synonyms or spellings. `{x}` is a gap for [the caller](super::wording::Voice::say) to fill.

/// Draws one of `n` alternatives.
pub(super) type Pick<'a> = &'a mut dyn FnMut(usize) -> usize;

/// Ways to put an instruction, the plain one first and most often.
const INSTRUCTIONS: &str = "(~|~|~|~|~|please ~|~(,|) please|(now|next,|ok,|okay,|then) ~|(can|could|would|will) you (|please )~?\
    |(can|could) you ~(, please| for me)?|(i want|i'd like|i would like|i need) you to ~|(just|let's|let us) ~\
    |(go ahead and|help me|try to|you should|you could) ~|(hi|hey|hello), ~)";
const INSTRUCTIONS_ZH: &str =
    "(~|~|~|~|请~|请~|请你~|帮我~|请帮我~|麻烦~|~吧|~，谢谢|现在~|能不能~？|可以~吗？|你能~吗？|我(想让|要|想要)你~)";
/// Ways to ask to be told something.
const REQUESTS: &str = "(~|~|~|please ~|~, please|(can|could|would|will) you (|please )~?|(now|just|ok,|hey,) ~\
    |(i want|i'd like|i would like|i need) you to ~)";
const REQUESTS_ZH: &str = "(~|~|请~|请你~|麻烦~|~吧|你能~吗？|可以~吗？)";

/// Words for which there are several.
const WORDS: [(&str, &str); 2] = [("PIC", "(picture|image|picture|photo|drawing|pic)"), ("COLOUR", "(colour|color)")];

/// A sentence of a pattern, with its gaps.
pub(super) fn sentence(pattern: &str, pick: Pick) -> String {
    let (openings, openings_zh) = match pattern.as_bytes().first() {
        Some(b'<') => (INSTRUCTIONS, INSTRUCTIONS_ZH),
        Some(b'[') => (REQUESTS, REQUESTS_ZH),
        _ => return expand(pattern, pick),
    };
    let core = clause(pattern, pick);
    let opening = if core.is_ascii() { openings } else { openings_zh };
    expand(opening, pick).replace('~', &core)
}

/// What an instruction is about, without an opening, to be joined with another.
pub(super) fn clause(pattern: &str, pick: Pick) -> String {
    expand(pattern.trim_matches(['<', '>', '[', ']']), pick)
}

/// Whether a pattern is an instruction, of which there is a [`clause`].
pub(super) fn is_instruction(pattern: &str) -> bool {
    pattern.starts_with('<')
}

/// The pattern with one alternative of every group.
fn expand(pattern: &str, pick: Pick) -> String {
    let pattern = WORDS.iter().fold(pattern.to_string(), |p, (word, group)| p.replace(word, group));
    let mut text = String::new();
    let mut rest = pattern.as_str();
    while let Some((before, group)) = rest.split_once('(') {
        text.push_str(before);
        // The alternatives, up to the bracket that closes the group.
        let (mut depth, mut starts, mut end) = (0, vec![0], group.len());
        for (i, c) in group.char_indices() {
            match c {
                '(' => depth += 1,
                ')' if depth == 0 => {
                    end = i;
                    break;
                }
                ')' => depth -= 1,
                '|' if depth == 0 => starts.push(i + 1),
                _ => {}
            }
        }
        let chosen = pick(starts.len());
        let until = starts.get(chosen + 1).map_or(end, |next| next - 1);
        text.push_str(&expand(&group[starts[chosen]..until], pick));
        rest = group.get(end + 1..).unwrap_or_default();
    }
    text.push_str(rest);
    text
}

/// Every sentence of a pattern.
#[cfg(test)]
pub(super) fn sentences(pattern: &str) -> Vec<String> {
    let (mut all, mut choices) = (Vec::new(), Vec::<(usize, usize)>::new());
    loop {
        let mut at = 0;
        all.push(sentence(pattern, &mut |n| {
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
        let put = sentences("<go>");
        for text in ["go", "please go", "could you please go?", "i'd like you to go", "let's go", "go, please"] {
            assert!(put.iter().any(|t| t == text), "{text}");
        }
        assert!(sentences("[tell me]").iter().all(|t| !t.contains("let")), "one does not propose to be told");
    }

    #[test]
    fn the_first_alternatives_are_the_canonical_sentence() {
        assert_eq!(sentence("<(remove|delete) {o}(| please)>", &mut |_| 0), "remove {o}");
    }
}
