use std::collections::HashSet;

use crate::{BLOCK_TOKENS, EngineError, Head, RowInput, Slice, Step};

/// What a model can take in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Rows of the embedding table.
    pub vocabulary: usize,
    /// VQ codes, for models that draw.
    pub codebook: Option<usize>,
    /// Width of embedding rows.
    pub hidden: usize,
    /// Positions of a sequence.
    pub context: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
}

impl Step {
    /// Checks everything that kernels rely on; after it no index of the step can be out of range.
    pub fn check(&self, limits: &Limits) -> Result<(), EngineError> {
        if self.rows.is_empty() {
            return refuse("no rows".into());
        }
        let wrong = self.rows.iter().enumerate().find_map(|(index, row)| limits.fault_of_row(row).map(|fault| (index, fault)));
        if let Some((index, fault)) = wrong {
            return refuse(format!("row {index}: {fault}"));
        }
        let mut next = 0;
        let mut written = HashSet::new();
        for (index, slice) in self.slices.iter().enumerate() {
            let in_order = slice.rows.start == next && slice.rows.end > next;
            let fault =
                if in_order { limits.fault_of_slice(slice) } else { Some(format!("rows {:?} do not follow row {next}", slice.rows)) };
            if let Some(fault) = fault {
                return refuse(format!("slice {index}: {fault}"));
            }
            if let Some(block) = slice.written_blocks().iter().find(|block| !written.insert(**block)) {
                return refuse(format!("slice {index}: block {block} is written twice"));
            }
            next = slice.rows.end;
        }
        if next != self.rows.len() {
            return refuse(format!("slices cover {next} of {} rows", self.rows.len()));
        }
        Ok(())
    }
}

impl Limits {
    fn fault_of_row(&self, row: &RowInput) -> Option<String> {
        match row {
            RowInput::Token(id) if *id as usize >= self.vocabulary => Some(format!("token {id} of {}", self.vocabulary)),
            RowInput::Code(code) => match self.codebook {
                None => Some("a VQ code, but the model has no generation embedding".into()),
                Some(size) if *code as usize >= size => Some(format!("code {code} of {size}")),
                Some(_) => None,
            },
            RowInput::Embedding { values, row } => self.fault_of_embedding(values, *row),
            RowInput::Token(_) => None,
        }
    }

    fn fault_of_embedding(&self, values: &[f32], row: usize) -> Option<String> {
        let rows = values.len() / self.hidden;
        if rows * self.hidden != values.len() || row >= rows {
            return Some(format!("embedding row {row} of {} values in rows of {}", values.len(), self.hidden));
        }
        let finite = values[row * self.hidden..(row + 1) * self.hidden].iter().all(|value| value.is_finite());
        (!finite).then(|| format!("embedding row {row} holds NaN or infinity"))
    }

    fn fault_of_slice(&self, slice: &Slice) -> Option<String> {
        let end = slice.start.saturating_add(slice.rows.len());
        if end.saturating_add(slice.shift) > self.context {
            return Some(format!("position {} of {}", end.saturating_add(slice.shift) - 1, self.context));
        }
        if end > slice.blocks.len() * BLOCK_TOKENS {
            return Some(format!("{} blocks do not cover {end} positions", slice.blocks.len()));
        }
        if let Some(block) = slice.blocks.iter().find(|block| **block as usize >= self.kv_blocks) {
            return Some(format!("block {block} of {}", self.kv_blocks));
        }
        let draws = slice.head == Some(Head::Image) && self.codebook.is_none();
        draws.then(|| "wants codes, but the model has no generation head".into())
    }
}

impl Slice {
    /// The blocks that the slice's rows are written to.
    fn written_blocks(&self) -> &[u32] {
        &self.blocks[self.start / BLOCK_TOKENS..self.end().div_ceil(BLOCK_TOKENS)]
    }
}

fn refuse(fault: String) -> Result<(), EngineError> {
    Err(EngineError::Step(fault))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { vocabulary: 10, codebook: Some(4), hidden: 2, context: 64, kv_blocks: 8 };

    fn step() -> Step {
        let embedding = RowInput::Embedding { values: vec![0.0, 1.0, 2.0, 3.0].into(), row: 1 };
        Step {
            rows: vec![RowInput::Token(9), RowInput::Code(3), embedding],
            slices: vec![
                Slice { rows: 0..2, start: 15, shift: 0, blocks: vec![3, 7], head: Some(Head::Image), may_lose_experts: false },
                Slice { rows: 2..3, start: 0, shift: 0, blocks: vec![0], head: None, may_lose_experts: false },
            ],
        }
    }

    #[test]
    fn a_good_step_passes() {
        assert_eq!(step().check(&LIMITS), Ok(()));
    }

    #[test]
    fn every_breach_is_named() {
        let no_pictures = Limits { codebook: None, ..LIMITS };
        let embedding = |values: Vec<f32>, row| RowInput::Embedding { values: values.into(), row };
        type Row<'a> = (&'a str, &'a Limits, &'a dyn Fn(&mut Step));
        let rows: [Row<'_>; 18] = [
            ("no rows", &LIMITS, &|step| *step = Step::default()),
            ("row 0: token 10 of 10", &LIMITS, &|step| step.rows[0] = RowInput::Token(10)),
            ("row 1: code 4 of 4", &LIMITS, &|step| step.rows[1] = RowInput::Code(4)),
            ("row 1: a VQ code, but", &no_pictures, &|_| ()),
            ("slice 0: wants codes, but", &no_pictures, &|step| step.rows[1] = RowInput::Token(1)),
            ("row 2: embedding row 2 of 4", &LIMITS, &|step| step.rows[2] = embedding(vec![0.0; 4], 2)),
            ("row 2: embedding row 0 of 3", &LIMITS, &|step| step.rows[2] = embedding(vec![0.0; 3], 0)),
            ("row 2: embedding row 0 holds NaN", &LIMITS, &|step| step.rows[2] = embedding(vec![0.0, f32::NAN], 0)),
            ("slice 1: rows 1..3 do not follow row 2", &LIMITS, &|step| step.slices[1].rows = 1..3),
            ("slice 1: rows 2..2 do not follow row 2", &LIMITS, &|step| step.slices[1].rows = 2..2),
            ("slices cover 2 of 3 rows", &LIMITS, &|step| step.slices.truncate(1)),
            ("slice 0: position 64 of 64", &LIMITS, &|step| step.slices[0].start = 63),
            ("slice 0: position", &LIMITS, &|step| step.slices[0].start = usize::MAX),
            ("slice 0: position 64 of 64", &LIMITS, &|step| step.slices[0].shift = 48),
            ("slice 0: position", &LIMITS, &|step| step.slices[0].shift = usize::MAX),
            ("slice 0: 1 blocks do not cover 17 positions", &LIMITS, &|step| step.slices[0].blocks.truncate(1)),
            ("slice 1: block 8 of 8", &LIMITS, &|step| step.slices[1].blocks[0] = 8),
            ("slice 1: block 7 is written twice", &LIMITS, &|step| step.slices[1].blocks[0] = 7),
        ];
        for (expected, limits, spoil) in rows {
            let mut step = step();
            spoil(&mut step);
            let Err(EngineError::Step(fault)) = step.check(limits) else { panic!("{expected}: not refused") };
            assert!(fault.starts_with(expected), "{fault:?} instead of {expected:?}");
        }
    }

    #[test]
    fn a_shared_prefix_may_be_read_by_many() {
        let mut step = step();
        step.slices[1] = Slice { rows: 2..3, start: 16, shift: 0, blocks: vec![3, 5], head: None, may_lose_experts: false };
        step.slices[0].start = 16;
        assert_eq!(step.check(&LIMITS), Ok(()));
    }
}
