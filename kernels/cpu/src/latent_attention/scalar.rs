//! Reference: the scores of a query whole, their softmax, the sum.

use super::{Job, Task};
use crate::{matmul::scalar::dot, softmax::scalar::softmax};

/// # Safety
/// As `Kernel`.
pub(crate) unsafe fn attend(job: &Job<'_>, task: &Task<'_>) {
    let rank = job.kv.shape.rank;
    for query in task.queries.clone() {
        let [q_c, q_pe] = job.query(task, query);
        let keys = || (0..job.limit(task, query)).map(|position| job.key(task, position).split_at(rank));
        let mut scores: Vec<f32> = keys().map(|(c, k_pe)| (dot(q_c, c) + dot(q_pe, k_pe)) * job.queries.scale).collect();
        softmax(&mut scores);

        // SAFETY: the caller has this query's output for itself.
        let out = unsafe { job.out(task, query) };
        out.fill(0.0);
        for (score, (c, _)) in scores.iter().zip(keys()) {
            out.iter_mut().zip(c).for_each(|(out, c)| *out += score * c);
        }
    }
}
