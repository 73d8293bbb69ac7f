//! Reference.

use super::Job;
use crate::matrix::elements;

/// # Safety
/// As `Kernel`.
pub(crate) unsafe fn transposed(job: &Job<'_>, head: usize) {
    let w = job.part(head);
    for row in 0..job.rows() {
        // SAFETY: the caller has this head for itself.
        let y = unsafe { job.y(row, head) };
        y.fill(0.0);
        for (n, x) in job.x(row, head).iter().enumerate() {
            y.iter_mut().zip(elements(w.dtype(), w.row(n))).for_each(|(y, w)| *y += x * w);
        }
    }
}
