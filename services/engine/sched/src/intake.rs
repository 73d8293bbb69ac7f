//! A job becomes a task, or is refused: after this nobody checks it again.

use std::sync::Arc;

use domain::{CodeGrid, Constraint, FlowState, Invalid, Job, Latent, LatentGrid, Mode, ModelCard, Prompt, Segment};
use layers::BLOCK_TOKENS;

use crate::{
    Guide, Guides, SubmitError,
    flow::Flow,
    inbox::Ticket,
    sampler::History,
    sequence::Sequence,
    stream::Outlet,
    task::{Output, Task},
};

/// What the model and its KV cache can take.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub card: ModelCard,
    pub kv_blocks: usize,
    pub prefix_cache: bool,
    /// Absent: jobs with a constraint are refused.
    pub guides: Option<Arc<dyn Guides>>,
}

impl Limits {
    /// Check a job and build its sequences.
    pub fn task(&self, job: Job, ticket: Ticket, outlet: Outlet) -> Result<Task, SubmitError> {
        self.prompt(&job.prompt, "prompt")?;
        let prompt_tokens = job.prompt.len();
        let (output, limit, unconditional) = match job.mode {
            Mode::Text { sampling, eos_token_ids } => {
                let limit = self.text_limit(prompt_tokens, sampling.max_tokens)?;
                let history = History::new(&sampling, token_ids(&job.prompt));
                let guide = sampling.constraint.as_ref().map(|constraint| self.guide(constraint, &eos_token_ids)).transpose()?;
                (Output::Text { sampling: Box::new(sampling), eos_token_ids, history, guide }, limit, None)
            }
            Mode::Image { unconditional, sampling } => {
                let grid = self.image_grid(&job.prompt, &unconditional)?;
                (Output::Image { sampling }, grid.len(), Some(unconditional))
            }
            Mode::Flow { unconditional, sampling, estimate_every, from } => {
                let grid = self.latent_grid(&job.prompt, &unconditional)?;
                let steps = sampling.steps;
                from.iter().try_for_each(|state| flow_state(state, steps, grid))?;
                (Output::Flow(Box::new(Flow::new(grid, &sampling, estimate_every, from))), steps as usize, Some(unconditional))
            }
        };
        self.emitted(&job.emitted, &output, limit)?;
        let prompts = std::iter::once(&job.prompt).chain(&unconditional);
        let sequence = |prompt: &Prompt| match (&output, self.card.latent_grid()) {
            // What follows the prompt stands at the same place for both, however little of the prompt is seen.
            (Output::Flow(_), Some(grid)) => Sequence::with_tail(prompt, grid.positions, prompt_tokens - prompt.len(), self.prefix_cache),
            (Output::Text { sampling, .. }, _) if sampling.allow_expert_loss => Sequence::new(prompt, self.prefix_cache).allowing_loss(),
            _ => Sequence::new(prompt, self.prefix_cache),
        };
        let sequences = prompts.map(sequence).collect();
        let mut task = Task::new(sequences, output, limit, outlet, ticket);
        for (index, id) in job.emitted.into_iter().enumerate() {
            task.resume(id).map_err(|reason| Invalid::new(format!("emitted[{index}]"), reason))?;
        }
        Ok(task)
    }

    fn guide(&self, constraint: &Constraint, eos_token_ids: &[u32]) -> Result<Box<dyn Guide>, SubmitError> {
        let unable = || SubmitError::Unguided("this engine was started without a tokenizer".into());
        Ok(self.guides.as_ref().ok_or_else(unable)?.guide(constraint, eos_token_ids)?)
    }

    fn prompt(&self, prompt: &Prompt, field: &str) -> Result<(), Invalid> {
        if prompt.is_empty() {
            return Err(Invalid::new(field, "the prompt is empty"));
        }
        for (i, segment) in prompt.segments.iter().enumerate() {
            let wrong = |reason| Err(Invalid::new(format!("{field}[{i}]"), reason));
            match segment {
                Segment::Tokens(ids) => {
                    if let Some(id) = ids.iter().find(|&&id| id as usize >= self.card.vocabulary_size) {
                        return wrong(format!("token {id} is not in the vocabulary of {}", self.card.vocabulary_size));
                    }
                }
                Segment::Embeddings(embeddings) => {
                    let (width, hidden) = (embeddings.width, self.card.hidden_size);
                    if width != hidden || embeddings.values.len() % hidden != 0 {
                        return wrong(format!("{} values in rows of {width}, the model takes rows of {hidden}", embeddings.values.len()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Most outputs of a text job: what it asks for, and what context and KV cache hold.
    fn text_limit(&self, prompt: usize, max_tokens: Option<u32>) -> Result<usize, SubmitError> {
        let context = self.card.context_length.min(self.kv_blocks * BLOCK_TOKENS);
        if prompt >= context {
            return Err(SubmitError::TooLong { prompt, output: 1, context });
        }
        Ok(max_tokens.map_or(usize::MAX, |max| max as usize).min(context - prompt))
    }

    /// The code grid of an image job whose pair of sequences fits.
    fn image_grid(&self, prompt: &Prompt, unconditional: &Prompt) -> Result<CodeGrid, SubmitError> {
        let grid = self.card.code_grid().ok_or_else(|| Invalid::new("image", format!("{} models cannot draw", self.card.family)))?;
        self.prompt(unconditional, "image.unconditional")?;
        if prompt.len() != unconditional.len() {
            let reason = format!("{} positions, the prompt has {}", unconditional.len(), prompt.len());
            return Err(Invalid::new("image.unconditional", reason).into());
        }
        let context = self.card.context_length.min(self.kv_blocks / 2 * BLOCK_TOKENS);
        // The last code is drawn but never fed back.
        let output = grid.len().saturating_sub(1);
        if prompt.len() + output > context {
            return Err(SubmitError::TooLong { prompt: prompt.len(), output, context });
        }
        Ok(grid)
    }

    /// The latent grid of a flow whose pair of sequences fits.
    fn latent_grid(&self, prompt: &Prompt, unconditional: &Prompt) -> Result<LatentGrid, SubmitError> {
        let grid = self.card.latent_grid();
        let grid = grid.ok_or_else(|| Invalid::new("flow", format!("{} models do not draw by a flow", self.card.family)))?;
        self.prompt(unconditional, "flow.unconditional")?;
        if unconditional.len() > prompt.len() {
            let reason = format!("{} positions, the prompt has {}", unconditional.len(), prompt.len());
            return Err(Invalid::new("flow.unconditional", reason).into());
        }
        let context = self.card.context_length.min(self.kv_blocks / 2 * BLOCK_TOKENS);
        if prompt.len() + grid.positions > context {
            return Err(SubmitError::TooLong { prompt: prompt.len(), output: grid.positions, context });
        }
        Ok(grid)
    }

    fn emitted(&self, emitted: &[u32], output: &Output, limit: usize) -> Result<(), Invalid> {
        let ids = match output {
            Output::Text { .. } => self.card.vocabulary_size,
            Output::Image { .. } => self.card.code_grid().map_or(0, |grid| grid.codebook_size),
            Output::Flow(_) if emitted.is_empty() => return Ok(()),
            Output::Flow(_) => return Err(Invalid::new("emitted", "a flow goes on from `flow.from`, not from outputs")),
        };
        if emitted.len() > limit {
            return Err(Invalid::new("emitted", format!("{} outputs, the job yields at most {limit}", emitted.len())));
        }
        match emitted.iter().find(|&&id| id as usize >= ids) {
            Some(id) => Err(Invalid::new("emitted", format!("{id} is not below {ids}"))),
            None => Ok(()),
        }
    }
}

/// A flow can only go on from a map of its own shape, within its own steps.
fn flow_state(state: &FlowState, steps: u32, grid: LatentGrid) -> Result<(), Invalid> {
    if state.done > steps {
        return Err(Invalid::new("flow.from.done", format!("{} of {steps} steps", state.done)));
    }
    if !state.z.fits(grid) {
        let Latent { channels, rows, columns, .. } = &state.z;
        let reason = format!("{channels} x {rows} x {columns} values, the image has {} x {} x {}", grid.channels, grid.rows, grid.columns);
        return Err(Invalid::new("flow.from.z", reason));
    }
    Ok(())
}

fn token_ids(prompt: &Prompt) -> impl Iterator<Item = u32> + '_ {
    prompt
        .segments
        .iter()
        .flat_map(|segment| match segment {
            Segment::Tokens(ids) => ids.as_slice(),
            Segment::Embeddings(_) => &[],
        })
        .copied()
}
