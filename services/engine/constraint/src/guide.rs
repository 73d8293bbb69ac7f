use std::fmt;

use llguidance::Matcher;
use sched::Guide;
use toktrie::SimpleVob;

use crate::compile::one_line;

/// Where one output stands on its way through a constraint.
pub(crate) struct Progress {
    matcher: Matcher,
    /// The tokenizer's end-of-sentence tokens: the library allows them where the text may end.
    end_marks: Vec<u32>,
    /// The job's: those that may be drawn there.
    eos_token_ids: Vec<u32>,
    /// An end-of-sentence token has been accepted.
    ended: bool,
}

impl Progress {
    pub fn new(matcher: Matcher, end_marks: &[u32], eos_token_ids: &[u32]) -> Self {
        Self { matcher, end_marks: end_marks.to_vec(), eos_token_ids: eos_token_ids.to_vec(), ended: false }
    }

    /// What may come next, with the job's end-of-sentence tokens where the text may end.
    fn allowed(&mut self) -> Result<SimpleVob, String> {
        let mut allowed = self.matcher.compute_mask().map_err(|error| format!("constraint: {}", one_line(&error)))?;
        let may_end = self.end_marks.iter().any(|&id| allowed.is_allowed(id));
        self.end_marks.iter().for_each(|&id| allowed.disallow_token(id));
        if may_end {
            let known = allowed.len();
            self.eos_token_ids.iter().filter(|&&id| (id as usize) < known).for_each(|&id| allowed.allow_token(id));
        }
        Ok(allowed)
    }
}

impl Guide for Progress {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let allowed = self.allowed()?;
        // 32 tokens to a word. Rows of the model beyond the tokenizer have no bit: they stand for nothing.
        let words = allowed.as_slice().iter().copied().chain(std::iter::repeat(0));
        let mut left = 0;
        for (word, logits) in words.zip(logits.chunks_mut(u32::BITS as usize)) {
            left |= word;
            match word {
                0 => logits.fill(f32::NEG_INFINITY),
                u32::MAX => {}
                _ => {
                    logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0).for_each(|(_, logit)| *logit = f32::NEG_INFINITY)
                }
            }
        }
        if left != 0 { Ok(()) } else { Err("constraint: no token of the vocabulary leads on".into()) }
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        let refused = || format!("token {id} is not what the constraint allows there");
        if self.ended {
            return Err(refused());
        }
        if self.eos_token_ids.contains(&id) {
            self.ended = self.allowed().is_ok_and(|allowed| allowed.is_allowed(id));
            return if self.ended { Ok(()) } else { Err(refused()) };
        }
        let known = !self.end_marks.contains(&id) && self.matcher.try_consume_tokens(&[id]).is_ok_and(|consumed| consumed == 1);
        if known { Ok(()) } else { Err(refused()) }
    }

    fn is_finished(&self) -> bool {
        self.ended || (self.matcher.is_stopped() && self.matcher.stop_reason().is_ok())
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").field("eos_token_ids", &self.eos_token_ids).field("ended", &self.ended).finish_non_exhaustive()
    }
}
