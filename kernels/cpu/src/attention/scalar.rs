//! Reference.

use super::{Job, Task};
use crate::{matmul::scalar::dot, softmax::scalar::softmax};

/// # Safety
/// As `Kernel`.
pub(crate) unsafe fn attend(job: &Job<'_>, task: &Task<'_>) {
    let shape = &job.kv.shape;
    let mut scores = Vec::new();
    for row in task.rows.clone() {
        for group in 0..job.group() {
            let query = &job.queries.values[job.span(row, task.kv_head, group)];
            let positions =
                || task.blocks(shape.block_tokens).iter().flat_map(|&block| shape.span(block, task.kv_head).step_by(shape.head_dim));
            let limit = task.limit(row);

            scores.clear();
            scores.extend(positions().take(limit).map(|at| dot(query, &job.kv.keys[at..at + shape.head_dim]) * job.queries.scale));
            softmax(&mut scores);

            // SAFETY: the caller has these rows and heads for itself.
            let out = unsafe { job.out(row, task.kv_head, group) };
            out.fill(0.0);
            for (score, at) in scores.iter().zip(positions()) {
                out.iter_mut().zip(&job.kv.values[at..]).for_each(|(out, value)| *out += score * value);
            }
        }
    }
}
