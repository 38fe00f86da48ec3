//! Two models on the same cases.

use std::fmt::Write;

use serde::Serialize;

use super::report::Measure;
use super::{Report, Share, share};

/// Two reports of the same suites, with the same seed and number of cases, and their differences.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// What the models are called, the first and the second.
    pub models: [String; 2],
    /// What was found, of each.
    pub reports: [Report; 2],
    /// All that was measured of both, in the order of the table; "mean" is that of a suite.
    pub differences: Vec<Difference>,
}

/// What the second model does better than the first.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The section of the table.
    pub suite: &'static str,
    /// The row.
    pub name: String,
    /// Number of cases.
    pub cases: usize,
    /// Share of the first, 0 to 1.
    pub a: f64,
    /// Share of the second.
    pub b: f64,
    /// The second's minus the first's, -1 to 1.
    pub difference: f64,
    /// The lower end of its 95% interval, by the bootstrap over pairs of cases.
    pub low: f64,
    /// The upper end.
    pub high: f64,
    /// Whether the interval leaves out 0.
    pub beyond_chance: bool,
}

impl Comparison {
    /// Compares the reports of two models.
    pub fn new(models: [String; 2], reports: [Report; 2]) -> Self {
        let (a, b) = (reports[0].measures(), reports[1].measures());
        // Of one that does not converse there are fewer.
        let same = |m: &Measure, n: &Measure| (m.suite, &m.name) == (n.suite, &n.name);
        let pairs: Vec<_> = a.iter().filter_map(|m| Some((m, b.iter().find(|n| same(m, n))?))).collect();
        let mut differences = Vec::new();
        for suite in pairs.chunk_by(|m, n| m.0.suite == n.0.suite) {
            let of = |pairs: &[(&Measure, &Measure)], name: &str| {
                let a: Vec<&Share> = pairs.iter().map(|(m, _)| m.share).collect();
                let b: Vec<&Share> = pairs.iter().map(|(_, n)| n.share).collect();
                let (difference, [low, high]) = share::difference(&a, &b);
                Difference {
                    suite: pairs[0].0.suite,
                    name: name.to_string(),
                    cases: a.iter().map(|share| share.count()).sum(),
                    a: share::mean(&a).0,
                    b: share::mean(&b).0,
                    difference,
                    low,
                    high,
                    beyond_chance: low > 0.0 || high < 0.0,
                }
            };
            differences.extend(suite.iter().map(|pair| of(&[*pair], &pair.0.name)));
            if suite.len() > 1 {
                differences.push(of(suite, "mean"));
            }
        }
        Self { models, reports, differences }
    }

    /// Text in five columns, with a final newline.
    pub fn table(&self) -> String {
        let [a, b] = &self.models;
        let report = &self.reports[0];
        let mut table = format!("A: {a}\nB: {b}\nseed {}, {} cases each\n", report.seed, report.per_category);
        let mut suite = "";
        for d in &self.differences {
            if d.suite != suite {
                suite = d.suite;
                // A String takes everything.
                let _ = writeln!(table, "\n{suite:<30} {:>8} {:>8} {:>8}   95% of B - A", "A", "B", "B - A");
            }
            let [a, b, difference, low, high] = [d.a, d.b, d.difference, d.low, d.high].map(|share| 100.0 * share);
            let mark = if d.beyond_chance { " *" } else { "" };
            let label = format!("  {}", d.name);
            let _ =
                writeln!(table, "{label:<30} {a:>7.1}% {b:>7.1}% {difference:>+8.1}   {low:+.1} to {high:+.1}{mark}");
        }
        table + "\n* beyond chance: the interval leaves out 0\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::compositions::{Category, Drawn};
    use crate::scenes::{Kind, Split};

    fn report(single: &str, two: &str) -> Report {
        let share = |cases: &str| cases.bytes().map(|c| c == b'1').collect::<Share>();
        let category = |kind, cases: &str| Category { kind, drawn: Drawn { score: share(cases), ..Drawn::default() } };
        Report {
            compositions: vec![category(Kind::SingleObject, single), category(Kind::TwoObjects, two)],
            ..Report::new("nano", 1, Split::HeldOut, 40)
        }
    }

    #[test]
    fn what_exceeds_chance_is_marked_and_nothing_else() {
        let (half, most) = ("10".repeat(20), "1110".repeat(10));
        let compared = Comparison::new(["a".into(), "b".into()], [report(&half, &half), report(&most, &half)]);
        let names: Vec<&str> = compared.differences.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(names, ["single object", "two objects", "mean"]);
        let [single, two, mean] = &compared.differences[..] else { panic!() };
        assert_eq!((single.cases, single.a, single.b, single.difference), (40, 0.5, 0.75, 0.25));
        assert!(single.beyond_chance && single.low > 0.1 && single.high < 0.4, "{single:?}");
        assert_eq!((two.difference, two.low, two.high, two.beyond_chance), (0.0, 0.0, 0.0, false));
        assert!(mean.beyond_chance && mean.cases == 80 && mean.difference == 0.125, "{mean:?}");
        let table = compared.table();
        let marked: Vec<&str> = table.lines().filter(|l| l.ends_with('*')).collect();
        assert!(
            marked.len() == 2 && marked[0].starts_with("  single object ") && marked[0].contains("+25.0"),
            "{table}"
        );
        let json = serde_json::to_value(&compared).unwrap();
        assert_eq!(json["differences"][0]["beyond_chance"], true);
        assert_eq!(json["reports"][1]["compositions"][0]["score"]["cases"], most);
    }

    #[test]
    fn what_only_one_can_do_is_not_compared() {
        let mut less = report("1", "1");
        less.compositions.pop();
        let compared = Comparison::new(["a".into(), "b".into()], [less, report("0", "1")]);
        assert_eq!(compared.differences.len(), 1);
        assert_eq!(compared.differences[0].difference, -1.0);
    }
}
