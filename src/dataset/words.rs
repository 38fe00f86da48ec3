//! Noun phrases: which names take an article, and which one.

/// Heads that take no article: stuff, pursuits, and plurals that do not end with s.
const MASS: &str = "bread cheese broccoli meat curry paper flatbread rice bacon popcorn butter salt food sushi sake ice cream spaghetti pasta oden mate milk coffee \
    tea fondue cooking camping wood fire fog garlic ginger coral tennis bowling hockey lacrosse badminton pong boxing yarn thread \
    soap money DNA construction lightning voltage toast chess mistletoe lava wheat corn lettuce kale paella stew ramen porridge \
    oatmeal granite timber jewelry art music people men women children teeth feet lipstick chocolate tempura confetti golf \
    poison surf trash garbage Fuji luggage denim";
/// Heads that end with a single s and are one thing.
const SINGULAR: &str = "bus cactus octopus walrus hippopotamus lotus hibiscus rhinoceros lens platypus abacus trolleybus \
    minibus tyrannosaurus brontosaurus canvas";
/// Beginnings that sound otherwise than they are spelt: `(prefix, takes "an")`.
const SOUNDS: [(&str, bool); 14] = [
    ("8", true),
    ("suv", true),
    ("hour", true),
    ("honest", true),
    ("heir", true),
    ("x-ray", true),
    ("uni", false),
    ("ufo", false),
    ("uku", false),
    ("uter", false),
    ("use", false),
    ("euro", false),
    ("ewe", false),
    ("one", false),
];

/// A name as a noun phrase: "a red apple", "an owl", "grapes", "the Statue of Liberty".
pub fn with_article(name: &str) -> String {
    // The head is the last word before a preposition: "glass of milk" is about a glass.
    let words: Vec<&str> = name.split(' ').collect();
    let ends = |w: &&str| ["of", "with", "in", "on", "and", "without", "from", "over", "behind", "at"].contains(w);
    let end = words.iter().position(ends).unwrap_or(words.len()).max(1);
    let head = words[end - 1];
    let listed = |list: &str| list.split_whitespace().any(|w| w == head);
    let plural = head.ends_with('s') && !head.ends_with("ss") && !listed(SINGULAR);
    let proper = name.starts_with("Mount") || name.starts_with("Tokyo") || name.ends_with("Claus");
    if ["Statue of Liberty", "Kaaba", "Milky Way"].contains(&name) {
        format!("the {name}")
    } else if plural || proper || listed(MASS) {
        name.to_string()
    } else {
        let lower = name.to_lowercase();
        let odd = SOUNDS.iter().find(|(prefix, _)| lower.starts_with(prefix)).map(|&(_, an)| an);
        let an = odd.unwrap_or_else(|| lower.starts_with(['a', 'e', 'i', 'o', 'u']));
        format!("{} {name}", if an { "an" } else { "a" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn articles_are_read_aloud() {
        for phrase in [
            "an owl",
            "a unicorn",
            "an umbrella",
            "an hourglass",
            "a ewe",
            "a euro banknote",
            "an ear of corn",
            "a bus",
            "a wine glass",
            "a cactus",
            "a glass of milk",
            "grapes",
            "french fries",
            "bread",
            "cooked rice",
            "glasses",
            "paw prints",
            "a UFO",
            "a fork and knife",
            "a T-Rex",
            "an x-ray",
            "an SUV",
            "a sunrise over mountains",
            "a nest with eggs",
        ] {
            let name = phrase.strip_prefix("an ").or(phrase.strip_prefix("a ")).unwrap_or(phrase);
            assert_eq!(with_article(name), phrase);
        }
        assert_eq!(with_article("Statue of Liberty"), "the Statue of Liberty");
    }
}
