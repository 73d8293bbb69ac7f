//! Reference.

use crate::{Dtype, matrix::elements};

pub(crate) fn widen(dtype: Dtype, bytes: &[u8], y: &mut [f32]) {
    elements(dtype, bytes).zip(y).for_each(|(value, y)| *y = value);
}
