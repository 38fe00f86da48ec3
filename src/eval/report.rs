//! What an evaluation found, as one table.

use std::fmt::Write;

use serde::Serialize;

use super::dialogues::{Dialogues, Edits, Questions};
use super::{Category, Recognition, Reconstruction, ThingEdits};
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
    /// Of a model that converses.
    pub dialogues: Option<Dialogues>,
    /// Needs the picture library too.
    pub thing_edits: Vec<ThingEdits>,
    /// Needs the picture library.
    pub recognition: Option<Recognition>,
    /// Needs the picture library.
    pub reconstruction: Option<Reconstruction>,
}

/// The JSON name of a kind, with spaces.
fn name(kind: impl Serialize) -> String {
    let json = serde_json::to_value(kind).ok();
    json.as_ref().and_then(|name| name.as_str()).unwrap_or_default().replace('_', " ")
}

impl Report {
    /// Text in up to five columns, with a final newline.
    pub fn table(&self) -> String {
        let mut table = format!("{}, seed {}\n", self.model, self.seed);
        let mut line = |label: &str, columns: &[&str]| {
            let mut row = format!("{}{label:<34}", if label.starts_with(' ') { "" } else { "\n" });
            for (column, width) in columns.iter().zip([9, 13, 13, 13]) {
                // A String takes everything.
                let _ = write!(row, " {column:>width$}");
            }
            let _ = writeln!(table, "{row}");
        };
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        if !self.compositions.is_empty() {
            self.drawings(&mut line);
        }
        if let Some(d) = &self.dialogues {
            self.dialogues(d, &mut line);
        }
        if !self.thing_edits.is_empty() {
            line("edits of things, none of them trained", &["model"]);
            self.thing_edits.iter().for_each(|e| line(&format!("  {}", name(e.kind)), &[&percent(e.score)]));
        }
        if let Some(r) = &self.recognition {
            let title = format!("recognition ({} among {})", r.concepts, r.gallery);
            line(&title, &["model", "reconstructed"]);
            line("  top-1 by meaning", &[&percent(r.semantic), &percent(r.ceiling_semantic)]);
            line("  top-1 by pixels", &[&percent(r.pixels), &percent(r.ceiling_pixels)]);
        }
        if let Some(r) = &self.reconstruction {
            line("reconstruction (held-out pictures)", &["PSNR dB", "SSIM"]);
            for (style, f) in [("the style it draws", &r.three_d), ("all styles", &r.all_styles)] {
                line(&format!("  {style} ({})", f.pictures), &[&format!("{:.2}", f.psnr), &format!("{:.4}", f.ssim)]);
            }
        }
        table
    }

    fn drawings(&self, line: &mut dyn FnMut(&str, &[&str])) {
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let split = if self.split == Split::Train { "trained, " } else { "" };
        line(&format!("compositions ({split}{} each)", self.per_category), &["model", "reconstructed", "ground truth"]);
        for c in &self.compositions {
            line(&format!("  {}", name(c.kind)), &[&percent(c.score), &percent(c.ceiling), &percent(c.ground_truth)]);
        }
        let mean = |f: fn(&Category) -> f64| {
            percent(self.compositions.iter().map(f).sum::<f64>() / self.compositions.len().max(1) as f64)
        };
        line("  mean", &[&mean(|c| c.score), &mean(|c| c.ceiling), &mean(|c| c.ground_truth)]);
    }

    fn dialogues(&self, d: &Dialogues, line: &mut dyn FnMut(&str, &[&str])) {
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let kept = |db: f64| format!("kept {db:.1} dB");
        let words = if self.split == Split::Train { "model" } else { "new words" };
        line("edits", &[words, "known words", "reconstructed", "copying"]);
        for e in &d.edits {
            let label = format!("  {} {}", name(e.kind), e.unchanged.map(kept).unwrap_or_default());
            let columns = [e.score, e.trained_words, e.ceiling, e.copying].map(percent);
            line(label.trim_end(), &columns.each_ref().map(String::as_str));
        }
        let of = |f: fn(&Edits) -> f64| mean(&d.edits.iter().map(f).collect::<Vec<_>>());
        let unchanged: Vec<f64> = d.edits.iter().filter_map(|e| e.unchanged).collect();
        let label = format!("  mean {}", kept(mean(&unchanged)));
        let columns: [fn(&Edits) -> f64; 4] = [|e| e.score, |e| e.trained_words, |e| e.ceiling, |e| e.copying];
        line(&label, &columns.map(|f| percent(of(f))).each_ref().map(String::as_str));
        line("questions", &[words, "known words", "one answer"]);
        for q in &d.questions {
            let columns = [q.score, q.trained_words, q.common].map(percent);
            line(&format!("  {}", name(q.kind)), &columns.each_ref().map(String::as_str));
        }
        let of = |f: fn(&Questions) -> f64| mean(&d.questions.iter().map(f).collect::<Vec<_>>());
        let columns: [fn(&Questions) -> f64; 3] = [|q| q.score, |q| q.trained_words, |q| q.common];
        line("  mean", &columns.map(|f| percent(of(f))).each_ref().map(String::as_str));
        line(&format!("two turns ({})", d.turns.count), &["model", "copying"]);
        line("  drawn", &[&percent(d.turns.drawn)]);
        line("  drawn, then edited", &[&percent(d.turns.edited), &percent(d.turns.copying)]);
        line(&format!("reasoning ({})", d.reasoning.count), &["model", "most common"]);
        line("  final prompt", &[&percent(d.reasoning.prompt), &percent(d.reasoning.common)]);
        line("  image", &[&percent(d.reasoning.image), &percent(d.reasoning.common)]);
        line("  final prompt of things", &[&percent(d.reasoning.things)]);
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
        let mut report = Report {
            model: "nano".into(),
            seed: 3,
            split: Split::HeldOut,
            per_category: 50,
            compositions: KINDS.map(|kind| Category { kind, score: 0.5, ceiling: 0.75, ground_truth: 1.0 }).into(),
            dialogues: None,
            thing_edits: Vec::new(),
            recognition: Some(Recognition {
                concepts: 780,
                gallery: 780,
                semantic: 0.75,
                pixels: 0.5,
                ceiling_semantic: 1.0,
                ceiling_pixels: 0.99,
            }),
            reconstruction: Some(Reconstruction { three_d: fidelity.clone(), all_styles: fidelity }),
        };
        let table = report.table();
        let rows: Vec<&str> = table.lines().skip(1).filter(|l| !l.is_empty()).collect();
        assert_eq!(rows.len(), 8 + 3 + 3);
        assert!(rows.iter().enumerate().all(|(i, r)| r.chars().count() == if i < 8 { 72 } else { 58 }), "{table}");
        assert!(rows[6].split_whitespace().eq(["attribute", "binding", "50.0%", "75.0%", "100.0%"]), "{table}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["compositions"][5]["kind"], "attribute_binding");
        assert_eq!(json["reconstruction"]["three_d"]["psnr"], 26.125);
        (report.recognition, report.reconstruction) = (None, None);
        assert_eq!(report.table().lines().filter(|l| !l.is_empty()).count(), 1 + 8);
    }
}
