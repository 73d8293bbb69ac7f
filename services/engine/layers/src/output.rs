use crate::{Backend, EngineError, Head, Losses, Observer, Step, StepOutput};

/// Shows a tensor to an observer that wants to see it.
pub fn observe<B: Backend>(backend: &B, observer: &mut dyn Observer, name: &str, x: &B::Tensor, width: usize) -> Result<(), EngineError> {
    if observer.active() {
        observer.tensor(name, &backend.download(x)?, width);
    }
    Ok(())
}

impl Step {
    /// The last rows of the slices that want logits of `head`, in order.
    pub fn rows_wanting(&self, head: Head) -> Vec<usize> {
        self.slices.iter().filter(|slice| slice.head == Some(head)).map(|slice| slice.rows.end - 1).collect()
    }

    /// All rows of the slices that want hidden states, in order.
    pub fn rows_wanting_hidden(&self) -> Vec<usize> {
        self.slices.iter().filter(|slice| slice.head == Some(Head::Hidden)).flat_map(|slice| slice.rows.clone()).collect()
    }
}

impl StepOutput {
    /// An output without logits yet.
    pub fn empty(step: &Step) -> Self {
        let slices = step.slices.len();
        Self { logits: vec![None; slices], hidden: vec![None; slices], lost: vec![0; slices] }
    }

    /// Counts for every slice its rows that lost an expert.
    pub fn count_losses(&mut self, step: &Step, losses: &Losses) {
        self.lost = step.slices.iter().map(|slice| losses.count(slice.rows.clone())).collect();
    }

    /// Hands the rows of `hidden` `[rows of the slices that want them, width]` to their slices.
    pub fn fill_hidden(&mut self, step: &Step, hidden: &[f32], width: usize) -> Result<(), EngineError> {
        let mut rest = hidden;
        let wanting = step.slices.iter().zip(&mut self.hidden).enumerate().filter(|(_, (slice, _))| slice.head == Some(Head::Hidden));
        for (index, (slice, out)) in wanting {
            let (rows, after) = rest.split_at(slice.rows.len() * width);
            if !rows.iter().all(|value| value.is_finite()) {
                return Err(EngineError::Compute(format!("the hidden states of slice {index} are not finite")));
            }
            *out = Some(rows.to_vec());
            rest = after;
        }
        Ok(())
    }

    /// Hands the rows of `logits` `[rows wanting head, width]` to their slices. Logits that are not finite are an error: nothing can be drawn from them.
    pub fn fill(&mut self, step: &Step, head: Head, logits: &[f32], width: usize) -> Result<(), EngineError> {
        let wanting = step.slices.iter().zip(&mut self.logits).enumerate().filter(|(_, (slice, _))| slice.head == Some(head));
        for ((index, (_, out)), row) in wanting.zip(logits.chunks_exact(width)) {
            if !row.iter().all(|value| value.is_finite()) {
                return Err(EngineError::Compute(format!("the logits of slice {index} are not finite ({head:?} head)")));
            }
            *out = Some(row.to_vec());
        }
        Ok(())
    }
}
