//! Reference.

pub(crate) fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let scale = 1.0 / x.iter().sum::<f32>();
    x.iter_mut().for_each(|x| *x *= scale);
}
