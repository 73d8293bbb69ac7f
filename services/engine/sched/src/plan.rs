use std::ops::Range;

use layers::Step;

use crate::task::Task;

/// A step to compute, and which task each of its slices belongs to.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub step: Step,
    /// One entry per task; together they cover the step's slices in order.
    pub parts: Vec<Part>,
}

/// The slices of one task.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// [`Task::order`] of the task.
    pub order: u64,
    /// Slices of the step: one per sequence of the task, in order; a sequence that takes no rows in this step has none.
    pub slices: Range<usize>,
    /// Rows taken from each sequence.
    pub rows: Vec<usize>,
    /// Whether the logits of every sequence were asked for.
    pub samples: bool,
}

impl Plan {
    /// Add `rows` rows of a task, fewer where a pair must not be torn. Returns how many were added.
    pub fn add(&mut self, task: &Task, rows: usize) -> usize {
        let taken = task.split(rows);
        let total = taken.iter().sum();
        let samples = total == task.remaining();
        let first_slice = self.step.slices.len();
        for (sequence, &count) in task.sequences().iter().zip(&taken).filter(|(_, count)| **count > 0) {
            let slice = sequence.slice(count, self.step.rows.len(), task.wants(sequence, samples));
            self.step.rows.extend_from_slice(sequence.next_inputs(count));
            self.step.slices.push(slice);
        }
        if total > 0 {
            let slices = first_slice..self.step.slices.len();
            self.parts.push(Part { order: task.order, slices, rows: taken, samples });
        }
        total
    }

    /// The same work as one plan per task.
    pub fn apart(&self) -> Vec<Plan> {
        self.parts.iter().map(|part| self.alone(part)).collect()
    }

    fn alone(&self, part: &Part) -> Plan {
        let mut step = Step::default();
        for slice in &self.step.slices[part.slices.clone()] {
            let mut slice = slice.clone();
            let first = step.rows.len();
            step.rows.extend_from_slice(&self.step.rows[slice.rows.clone()]);
            slice.rows = first..step.rows.len();
            step.slices.push(slice);
        }
        let part = Part { slices: 0..step.slices.len(), ..part.clone() };
        Plan { step, parts: vec![part] }
    }
}
