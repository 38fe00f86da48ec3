//! What an evaluation found, as one table.

use std::fmt::Write;

use serde::Serialize;

use super::compositions::Drawn;
use super::dialogues::{Dialogues, Edits, Questions, Worded};
use super::{Category, Oblong, Recognition, Reconstruction, Share, Texture, ThingEdits, share};
use crate::scenes::Split;

/// Results of all suites that ran.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name of the model.
    pub model: String,
    /// Decided all randomness.
    pub seed: u64,
    /// Where the compositions are from.
    pub split: Split,
    /// Prompts per category of compositions.
    pub per_category: usize,
    /// By category, in GenEval's order; none if nothing was composed.
    pub compositions: Vec<Category>,
    /// By aspect ratio.
    pub oblong: Vec<Oblong>,
    /// Of a model that converses.
    pub dialogues: Option<Dialogues>,
    /// Needs the picture library too.
    pub thing_edits: Vec<ThingEdits>,
    /// Needs the picture library.
    pub recognition: Option<Recognition>,
    /// Needs the picture library.
    pub reconstruction: Option<Reconstruction>,
}

/// A share that measures the model, and where it stands in a report.
pub struct Measure<'a> {
    /// The section: "edits".
    pub suite: &'static str,
    /// The row: "remove".
    pub name: String,
    /// The share.
    pub share: &'a Share,
}

/// The JSON name of a kind, with spaces.
fn name(kind: impl Serialize) -> String {
    let json = serde_json::to_value(kind).ok();
    json.as_ref().and_then(|name| name.as_str()).unwrap_or_default().replace('_', " ")
}

/// Writes a row of a table.
type Line<'a> = &'a mut dyn FnMut(&str, &[String]);

/// Column heads.
fn heads(heads: &[&str]) -> Vec<String> {
    heads.iter().map(|head| head.to_string()).collect()
}

/// "52.0% 38-65": a share and its interval, in percent.
fn cell(value: f64, [low, high]: [f64; 2]) -> String {
    format!("{:.1}% {:.0}-{:.0}", 100.0 * value, 100.0 * low, 100.0 * high)
}

fn cells<const N: usize>(shares: [&Share; N]) -> Vec<String> {
    shares.iter().map(|share| cell(share.value(), share.interval())).collect()
}

/// The means of columns of shares.
fn means<T, const N: usize>(rows: &[T], columns: [fn(&T) -> &Share; N]) -> Vec<String> {
    let mean = |column: &fn(&T) -> &Share| {
        let (value, interval) = share::mean(&rows.iter().map(column).collect::<Vec<_>>());
        cell(value, interval)
    };
    columns.iter().map(mean).collect()
}

impl Report {
    /// One without any results yet.
    pub fn new(model: &str, seed: u64, split: Split, per_category: usize) -> Self {
        Self {
            model: model.to_string(),
            seed,
            split,
            per_category,
            compositions: Vec::new(),
            oblong: Vec::new(),
            dialogues: None,
            thing_edits: Vec::new(),
            recognition: None,
            reconstruction: None,
        }
    }

    /// Text in up to five columns, with a final newline: shares with their 95% intervals. Every
    /// held-out wording has a row of its own only with `wordings`.
    pub fn table(&self, wordings: bool) -> String {
        let mut table = format!("{}, seed {}; shares with their 95% intervals\n", self.model, self.seed);
        let mut line = |label: &str, columns: &[String]| {
            let mut row = format!("{}{label:<30}", if label.starts_with(' ') { "" } else { "\n" });
            for column in columns {
                // A String takes everything.
                let _ = write!(row, " {column:>13}");
            }
            let _ = writeln!(table, "{}", row.trim_end());
        };
        self.drawings(&mut line);
        if let Some(d) = &self.dialogues {
            self.dialogues(d, wordings, &mut line);
        }
        if !self.thing_edits.is_empty() {
            line("edits of untrained things", &heads(&["model"]));
            self.thing_edits.iter().for_each(|e| line(&format!("  {}", name(e.kind)), &cells([&e.score])));
        }
        if let Some(r) = &self.recognition {
            let title = format!("recognition ({} among {})", r.concepts, r.gallery);
            line(&title, &heads(&["model", "reconstructed"]));
            line("  top-1 by meaning", &cells([&r.semantic, &r.ceiling_semantic]));
            if let (Some(drawn), Some(back)) = (&r.texture, &r.ceiling_texture) {
                let both = |f: fn(&Texture) -> f64| [drawn, back].map(|texture| format!("{:.1}", f(texture)));
                line("  texture distance, SWD x 1000", &both(Texture::mean_wasserstein));
                line("  edge energy, % of originals", &both(|texture| 100.0 * texture.edges));
                line("  Frechet distance x 1000", &both(|texture| 1e3 * texture.frechet));
            }
        }
        if let Some(r) = &self.reconstruction {
            line("reconstruction (held-out)", &heads(&["PSNR dB", "SSIM"]));
            for (style, f) in [("the style it draws", &r.three_d), ("all styles", &r.all_styles)] {
                let values = [format!("{:.2}", f.psnr), format!("{:.4}", f.ssim)];
                line(&format!("  {style} ({})", f.pictures), &values);
            }
        }
        table
    }

    fn drawings(&self, line: Line) {
        let split = if self.split == Split::Train { "trained, " } else { "" };
        let columns = heads(&["model", "reconstructed", "ground truth"]);
        let row = |d: &Drawn| cells([&d.score, &d.ceiling, &d.ground_truth]);
        if !self.compositions.is_empty() {
            line(&format!("compositions ({split}{} each)", self.per_category), &columns);
            self.compositions.iter().for_each(|c| line(&format!("  {}", name(c.kind)), &row(&c.drawn)));
            let of: [fn(&Category) -> &Share; 3] =
                [|c| &c.drawn.score, |c| &c.drawn.ceiling, |c| &c.drawn.ground_truth];
            line("  mean", &means(&self.compositions, of));
        }
        if !self.oblong.is_empty() {
            line(&format!("oblong ({split}{} each)", self.per_category), &columns);
            self.oblong.iter().for_each(|o| line(&format!("  {}", o.ratio), &row(&o.drawn)));
            let of: [fn(&Oblong) -> &Share; 3] = [|o| &o.drawn.score, |o| &o.drawn.ceiling, |o| &o.drawn.ground_truth];
            line("  mean", &means(&self.oblong, of));
        }
    }

    fn dialogues(&self, d: &Dialogues, wordings: bool, line: Line) {
        let kept = |db: f64| format!("kept {db:.1} dB");
        let words = if self.split == Split::Train { "model" } else { "new words" };
        line("edits", &heads(&[words, "known words", "reconstructed", "copying"]));
        for e in &d.edits {
            let label = format!("  {} {}", name(e.kind), e.unchanged.map(kept).unwrap_or_default());
            line(label.trim_end(), &cells([&e.score, &e.trained_words, &e.ceiling, &e.copying]));
        }
        let unchanged: Vec<f64> = d.edits.iter().filter_map(|e| e.unchanged).collect();
        let label = format!("  mean {}", kept(unchanged.iter().sum::<f64>() / unchanged.len().max(1) as f64));
        let of: [fn(&Edits) -> &Share; 4] = [|e| &e.score, |e| &e.trained_words, |e| &e.ceiling, |e| &e.copying];
        line(&label, &means(&d.edits, of));
        line("questions", &heads(&[words, "known words", "one answer"]));
        for q in &d.questions {
            line(&format!("  {}", name(q.kind)), &cells([&q.score, &q.trained_words, &q.common]));
        }
        let of: [fn(&Questions) -> &Share; 3] = [|q| &q.score, |q| &q.trained_words, |q| &q.common];
        line("  mean", &means(&d.questions, of));
        line(&format!("two turns ({})", d.turns.count), &heads(&["model", "copying"]));
        line("  drawn", &cells([&d.turns.drawn]));
        line("  drawn, then edited", &cells([&d.turns.edited, &d.turns.copying]));
        line(&format!("reasoning ({})", d.reasoning.count), &heads(&["model", "most common"]));
        line("  final prompt", &cells([&d.reasoning.prompt, &d.reasoning.common]));
        line("  image", &cells([&d.reasoning.image, &d.reasoning.common]));
        line("  final prompt of things", &cells([&d.reasoning.things]));
        if wordings {
            let edits = d.edits.iter().map(|e| ("edits", name(e.kind), &e.wordings));
            let questions = d.questions.iter().map(|q| ("questions", name(q.kind), &q.wordings));
            edits
                .chain(questions)
                .for_each(|(of, kind, wordings)| by_wording(&format!("{of}: {kind}"), wordings, line));
        }
    }

    /// Every share that measures the model, in the order of the table.
    pub fn measures(&self) -> Vec<Measure<'_>> {
        let mut all = Vec::new();
        let mut add = |suite, name: String, share| all.push(Measure { suite, name, share });
        self.compositions.iter().for_each(|c| add("compositions", name(c.kind), &c.drawn.score));
        self.oblong.iter().for_each(|o| add("oblong", o.ratio.into(), &o.drawn.score));
        if let Some(d) = &self.dialogues {
            let new = self.split == Split::HeldOut;
            d.edits.iter().filter(|_| new).for_each(|e| add("edits, new words", name(e.kind), &e.score));
            d.edits.iter().for_each(|e| add("edits, known words", name(e.kind), &e.trained_words));
            d.questions.iter().filter(|_| new).for_each(|q| add("questions, new words", name(q.kind), &q.score));
            d.questions.iter().for_each(|q| add("questions, known words", name(q.kind), &q.trained_words));
            add("two turns", "drawn".into(), &d.turns.drawn);
            add("two turns", "drawn, then edited".into(), &d.turns.edited);
            add("reasoning", "final prompt".into(), &d.reasoning.prompt);
            add("reasoning", "image".into(), &d.reasoning.image);
            add("reasoning", "final prompt of things".into(), &d.reasoning.things);
        }
        self.thing_edits.iter().for_each(|e| add("edits of untrained things", name(e.kind), &e.score));
        if let Some(r) = &self.recognition {
            add("recognition", "top-1 by meaning".into(), &r.semantic);
        }
        all
    }
}

/// A row for each wording, the worst first.
fn by_wording(title: &str, wordings: &[Worded], line: Line) {
    line(title, &heads(&["model", "cases"]));
    let mut sorted: Vec<&Worded> = wordings.iter().collect();
    sorted.sort_by(|a, b| a.score.value().total_cmp(&b.score.value()));
    for worded in sorted {
        let [share] = &cells([&worded.score])[..] else { continue };
        line("  ", &[share.clone(), worded.score.count().to_string(), format!(" {:<13}", worded.wording)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::Fidelity;
    use crate::scenes::KINDS;

    #[test]
    fn the_table_is_aligned_and_the_json_complete() {
        let fidelity = Fidelity { pictures: 179, psnr: 26.125, ssim: 0.91 };
        let share = |right: usize| (0..40).map(|i| i < right).collect::<Share>();
        let drawn = Drawn { score: share(20), ceiling: share(30), ground_truth: share(40) };
        let mut report = Report {
            compositions: KINDS.map(|kind| Category { kind, drawn: drawn.clone() }).into(),
            oblong: vec![Oblong { ratio: "4:1", drawn: drawn.clone() }],
            recognition: Some(Recognition {
                concepts: 780,
                gallery: 780,
                semantic: share(30),
                ceiling_semantic: share(40),
                texture: Some(Texture { wasserstein: vec![300.0, 200.0, 100.0], edges: 0.7, frechet: 0.05 }),
                ceiling_texture: Some(Texture { wasserstein: vec![30.0; 3], edges: 0.9, frechet: 0.01 }),
            }),
            reconstruction: Some(Reconstruction { three_d: fidelity.clone(), all_styles: fidelity }),
            ..Report::new("nano", 3, Split::HeldOut, 50)
        };
        let table = report.table(false);
        let rows: Vec<&str> = table.lines().skip(1).filter(|l| !l.is_empty()).collect();
        assert_eq!(rows.len(), 8 + 3 + 5 + 3);
        assert!(table.contains("200.0") && table.contains("70.0"), "{table}");
        assert!(rows.iter().enumerate().all(|(i, r)| r.chars().count() == if i < 11 { 72 } else { 58 }), "{table}");
        let binding = ["attribute", "binding", "50.0%", "35-65", "75.0%", "60-86", "100.0%", "91-100"];
        assert!(rows[6].split_whitespace().eq(binding), "{table}");
        // The mean of six equal shares is surer than each.
        assert!(rows[7].split_whitespace().take(3).eq(["mean", "50.0%", "44-56"]), "{table}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["compositions"][5]["kind"], "attribute_binding");
        assert_eq!((&json["oblong"][0]["score"]["share"], &json["oblong"][0]["ratio"]), (&0.5.into(), &"4:1".into()));
        assert_eq!(json["reconstruction"]["three_d"]["psnr"], 26.125);
        assert_eq!(report.measures().len(), 6 + 1 + 1);
        (report.recognition, report.reconstruction) = (None, None);
        assert_eq!(report.table(false).lines().filter(|l| !l.is_empty()).count(), 1 + 8 + 3);
    }
}
