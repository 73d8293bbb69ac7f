//! Reference.

pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let squares: f64 = row.iter().map(|&v| f64::from(v) * f64::from(v)).sum();
        let scale = 1.0 / ((squares / row.len() as f64) as f32 + eps).sqrt();
        row.iter_mut().zip(weight).for_each(|(v, w)| *v = w * (*v * scale));
    }
}
