use serde_json::{Value, json};

use super::golden::{Tensor, Values};
use crate::Failure;
use crate::terminal::{self, BAD, BOLD, DIM, GOOD, paint};

/// The comparisons of one folder.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

/// One quantity beside its reference.
#[derive(Debug)]
struct Row {
    quantity: String,
    /// Largest absolute difference; for ids and strings the number of those that differ. `None`: nothing could be compared.
    difference: Option<f64>,
    tolerance: f64,
    /// Why it failed or what is worth knowing.
    note: String,
    pass: bool,
}

impl Report {
    /// A number each of which may be `tolerance` away from its reference.
    pub fn close(&mut self, quantity: &str, found: &[f32], reference: &Tensor, tolerance: f64) {
        let Values::F32(expected) = &reference.values else {
            return self.fail(quantity, "the reference is not a tensor of real numbers");
        };
        if found.len() != expected.len() {
            return self.fail(quantity, &format!("{} values, the reference has {} ({:?})", found.len(), expected.len(), reference.shape));
        }
        self.push_close(quantity, max_abs(found, expected), tolerance);
    }

    /// A single number.
    pub fn near(&mut self, quantity: &str, found: f64, expected: f64, tolerance: f64) {
        self.push_close(quantity, (found - expected).abs(), tolerance);
    }

    /// Things that must be the same, such as ids or texts.
    pub fn same<T: PartialEq + std::fmt::Debug>(&mut self, quantity: &str, found: &[T], expected: &[T]) {
        let longest = found.len().max(expected.len());
        let wrong = (0..longest).filter(|&i| found.get(i) != expected.get(i)).count();
        let first = (0..longest).find(|&i| found.get(i) != expected.get(i));
        let note = first.map(|i| format!("at {i}: {} instead of {}", shown(found.get(i)), shown(expected.get(i)))).unwrap_or_default();
        self.push(Row { quantity: quantity.to_owned(), difference: Some(wrong as f64), tolerance: 0.0, note, pass: wrong == 0 });
    }

    /// 8-bit values. `allowed(i)`: how many levels value `i` may be away.
    pub fn levels(&mut self, quantity: &str, found: &[u8], expected: &[u8], allowed: impl Fn(usize) -> u8) {
        if found.len() != expected.len() {
            return self.fail(quantity, &format!("{} values, the reference has {}", found.len(), expected.len()));
        }
        let distances: Vec<u8> = found.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).collect();
        let wrong = distances.iter().enumerate().filter(|&(i, &distance)| distance > allowed(i)).count();
        let off = distances.iter().filter(|distance| **distance > 0).count();
        let difference = f64::from(distances.iter().copied().max().unwrap_or(0));
        let tolerance = f64::from((0..distances.len()).map(&allowed).max().unwrap_or(0));
        let note = match (wrong, off) {
            (0, 0) => String::new(),
            (0, _) => format!("{off} of {} values next to a rounding step", found.len()),
            _ => format!("{wrong} of {} values are too far away", found.len()),
        };
        self.push(Row { quantity: quantity.to_owned(), difference: Some(difference), tolerance, note, pass: wrong == 0 });
    }

    /// A quantity that could not be computed, or that nobody knows.
    pub fn fail(&mut self, quantity: &str, why: &str) {
        self.push(Row { quantity: quantity.to_owned(), difference: None, tolerance: 0.0, note: why.to_owned(), pass: false });
    }

    /// Whether all rows pass, and there is at least one.
    pub fn passed(&self) -> bool {
        !self.rows.is_empty() && self.failures() == 0
    }

    fn failures(&self) -> usize {
        self.rows.iter().filter(|row| !row.pass).count()
    }

    fn push_close(&mut self, quantity: &str, difference: f64, tolerance: f64) {
        // A NaN is within no tolerance.
        let pass = difference <= tolerance;
        let note = if difference.is_nan() { "NaN" } else { "" };
        self.push(Row { quantity: quantity.to_owned(), difference: Some(difference), tolerance, note: note.to_owned(), pass });
    }

    fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// A table for people, with a count below.
    pub fn print(&self) -> Result<(), Failure> {
        let width = self.rows.iter().map(|row| row.quantity.chars().count()).max().unwrap_or(0).max("quantity".len());
        terminal::line(&paint(BOLD, format!("{:width$}  {:>10}  {:>9}  result", "quantity", "max diff", "tolerance")))?;
        for row in &self.rows {
            let difference = row.difference.map_or_else(|| "-".to_owned(), number);
            let result = if row.pass { paint(GOOD, "pass") } else { paint(BAD, "FAIL") };
            let numbers = format!("{:width$}  {difference:>10}  {:>9}", row.quantity, number(row.tolerance));
            let note = if row.note.is_empty() { String::new() } else { format!("  {}", paint(DIM, &row.note)) };
            if !terminal::line(&format!("{numbers}  {result}{note}"))? {
                return Ok(());
            }
        }
        let counts = format!("{} compared, {} failed", self.rows.len(), self.failures());
        terminal::line(&paint(if self.passed() { GOOD } else { BAD }, counts)).map(drop)
    }

    /// Everything as one JSON object, with the facts in `about` first.
    pub fn to_json(&self, about: Value) -> Value {
        let row = |row: &Row| json!({"quantity": row.quantity, "max_abs": row.difference, "tolerance": row.tolerance, "pass": row.pass, "note": row.note});
        let mut value = about;
        value["rows"] = self.rows.iter().map(row).collect();
        value["compared"] = self.rows.len().into();
        value["failed"] = self.failures().into();
        value["pass"] = self.passed().into();
        value
    }
}

/// Largest absolute difference; NaN when any value is NaN.
fn max_abs(a: &[f32], b: &[f32]) -> f64 {
    let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0.0, |largest, d| if d.is_nan() || f64::is_nan(largest) { f64::NAN } else { largest.max(d) })
}

fn number(value: f64) -> String {
    if value == 0.0 || (value.fract() == 0.0 && value < 1e6) { format!("{value}") } else { format!("{value:.1e}") }
}

fn shown<T: std::fmt::Debug>(value: Option<&T>) -> String {
    const LONGEST: usize = 60; // characters
    let text = value.map_or_else(|| "nothing".to_owned(), |value| format!("{value:?}"));
    if text.chars().count() > LONGEST { text.chars().take(LONGEST).chain(['…']).collect() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(values: &[f32]) -> Tensor {
        Tensor { shape: vec![values.len()], values: Values::F32(values.to_vec()) }
    }

    fn passes(compare: impl Fn(&mut Report)) -> bool {
        let mut report = Report::default();
        compare(&mut report);
        report.passed()
    }

    #[test]
    fn verdicts() {
        let nothing = |_: &mut Report| {};
        assert!(!passes(nothing), "a folder with nothing to compare does not pass");
        assert!(passes(|r| r.close("x", &[1.0, 2.0], &tensor(&[1.0, 2.5]), 0.5)));
        assert!(!passes(|r| r.close("x", &[1.0, 2.0], &tensor(&[1.0, 2.5]), 0.4)));
        assert!(!passes(|r| r.close("x", &[f32::NAN, 2.0], &tensor(&[1.0, 2.0]), 9.0)));
        assert!(!passes(|r| r.close("x", &[1.0], &tensor(&[1.0, 2.0]), 9.0)));
        assert!(passes(|r| r.same("x", &[1, 2], &[1, 2])));
        assert!(!passes(|r| r.same("x", &[1, 2], &[1, 2, 3])));
        assert!(!passes(|r| r.same("x", &[1, 3], &[1, 2])));
        assert!(passes(|r| r.levels("x", &[1, 3], &[1, 2], |i| u8::from(i == 1))));
        assert!(!passes(|r| r.levels("x", &[1, 3], &[1, 2], |i| u8::from(i == 0))));
        assert!(!passes(|r| r.fail("x", "unknown")));
    }
}
