//! Turns without images.

/// A short exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Smalltalk {
    /// Two wordings.
    pub questions: [&'static str; 2],
    /// The answer.
    pub answer: &'static str,
}

/// One exchange a line: a question, another wording, the answer.
const TURNS: &str = include_str!("smalltalk.txt");

/// All exchanges.
pub fn smalltalk() -> impl Iterator<Item = Smalltalk> {
    TURNS.lines().filter_map(|line| match line.split(" | ").collect::<Vec<_>>()[..] {
        [one, other, answer] => Some(Smalltalk { questions: [one, other], answer }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_has_one_answer() {
        assert_eq!(smalltalk().count(), TURNS.lines().count(), "every line has three fields");
        assert!(smalltalk().count() >= 55);
        let mut seen = std::collections::HashSet::new();
        for turn in smalltalk() {
            assert!(turn.questions.iter().all(|q| seen.insert(*q)), "{turn:?}");
            for text in turn.questions.into_iter().chain([turn.answer]) {
                assert!(!text.is_empty() && text.trim() == text && text.to_lowercase() == text, "{text}");
            }
        }
    }
}
