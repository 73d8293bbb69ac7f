//! A job becomes a task, or is refused: after this nobody checks it again.

use std::sync::Arc;

use domain::{CodeGrid, Constraint, Invalid, Job, Mode, ModelCard, Prompt, Segment};
use layers::BLOCK_TOKENS;

use crate::{
    Guide, Guides, SubmitError,
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
                (Output::Text { sampling, eos_token_ids, history, guide }, limit, None)
            }
            Mode::Image { unconditional, sampling } => {
                let grid = self.image_grid(&job.prompt, &unconditional)?;
                (Output::Image { sampling }, grid.len(), Some(unconditional))
            }
        };
        self.emitted(&job.emitted, &output, limit)?;
        let prompts = std::iter::once(&job.prompt).chain(&unconditional);
        let sequences = prompts.map(|prompt| Sequence::new(prompt, self.prefix_cache)).collect();
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
        let grid = self.card.code_grid.ok_or_else(|| Invalid::new("image", format!("{} models cannot draw", self.card.family)))?;
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

    fn emitted(&self, emitted: &[u32], output: &Output, limit: usize) -> Result<(), Invalid> {
        let ids = match output {
            Output::Text { .. } => self.card.vocabulary_size,
            Output::Image { .. } => self.card.code_grid.map_or(0, |grid| grid.codebook_size),
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
