//! Eight at a time.

use crate::{
    Dtype,
    avx2::{BF16, F16, F32, load, load_part, size, write},
};

pub(crate) fn widen(dtype: Dtype, bytes: &[u8], y: &mut [f32]) {
    assert_eq!(bytes.len(), y.len() * dtype.size(), "as many elements as bytes for them");
    // SAFETY: the table that holds this function is only handed out on a CPU with these features.
    unsafe {
        match dtype {
            Dtype::F32 => widen_eights::<F32>(bytes, y),
            Dtype::BF16 => widen_eights::<BF16>(bytes, y),
            Dtype::F16 => widen_eights::<F16>(bytes, y),
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen_eights<const DTYPE: u8>(bytes: &[u8], y: &mut [f32]) {
    for (bytes, y) in bytes.chunks(8 * size(DTYPE)).zip(y.chunks_mut(8)) {
        // SAFETY: the piece of `bytes` holds as many elements as the piece of `y`.
        let values = unsafe {
            match y.len() {
                8 => load::<DTYPE>(bytes.as_ptr()),
                count => load_part::<DTYPE>(bytes.as_ptr(), count),
            }
        };
        write(y, values);
    }
}
