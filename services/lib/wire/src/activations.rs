//! Rows of activations as bytes: exact, or in fewer bytes and rounded.

use bytes::Bytes;
use domain::Invalid;
use proto::v1::Activations;
use proto::v1::activations::Encoding;

/// Largest whole number of an 8-bit row.
const LARGEST: f32 = 127.0;

/// `values` `[rows, width]` in an encoding. Rows are rounded each by itself.
///
/// * f32: as they are.
/// * bf16: to nearest even, at most 2^-8 of each number away.
/// * int8: whole multiples of the row's largest number over 127, at most half of that away.
pub fn pack(values: Vec<f32>, width: usize, encoding: Encoding) -> Activations {
    let rows = (values.len() / width) as u32;
    let (data, scales) = match encoding {
        // Not copied: the numbers of this machine are little endian, as its checkpoints are.
        Encoding::Unspecified | Encoding::F32 => (Bytes::from_owner(Numbers(values)), Vec::new()),
        Encoding::Bf16 => {
            let rounded: Vec<u8> = values.iter().flat_map(|value| half::bf16::from_f32(*value).to_le_bytes()).collect();
            (rounded.into(), Vec::new())
        }
        Encoding::Int8 => {
            let (data, scales) = pack_int8(&values, width);
            (data.into(), scales)
        }
    };
    let encoding = if encoding == Encoding::Unspecified { Encoding::F32 } else { encoding };
    Activations { rows, width: width as u32, encoding: encoding.into(), data, scales }
}

/// Numbers as the bytes that they are in memory.
struct Numbers(Vec<f32>);

impl AsRef<[u8]> for Numbers {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

fn pack_int8(values: &[f32], width: usize) -> (Vec<u8>, Vec<f32>) {
    let (mut data, mut scales) = (Vec::with_capacity(values.len()), Vec::with_capacity(values.len() / width));
    for row in values.chunks_exact(width) {
        let scale = row.iter().fold(0.0f32, |most, value| most.max(value.abs())) / LARGEST;
        let inverse = if scale > 0.0 { scale.recip() } else { 0.0 };
        data.extend(row.iter().map(|value| (value * inverse).round_ties_even().clamp(-LARGEST, LARGEST) as i8 as u8));
        scales.push(scale);
    }
    (data, scales)
}

/// The numbers of `packed`, which must be rows of `width` and finite: whoever computes with them could not tell a NaN's origin later.
pub fn unpack(field: &str, packed: &Activations, width: usize) -> Result<Vec<f32>, Invalid> {
    let refuse = |reason: String| Err(Invalid::new(field, reason));
    if packed.width as usize != width {
        return refuse(format!("rows of {}, {width} expected", packed.width));
    }
    let size = match packed.encoding() {
        Encoding::F32 => 4,
        Encoding::Bf16 => 2,
        Encoding::Int8 => 1,
        Encoding::Unspecified => return refuse("no known encoding".into()),
    };
    let count = (packed.rows as usize).checked_mul(width);
    if count.and_then(|count| count.checked_mul(size)) != Some(packed.data.len()) {
        return refuse(format!("{} bytes for {} rows of {width} numbers of {size} bytes", packed.data.len(), packed.rows));
    }
    let scales = if packed.encoding() == Encoding::Int8 { packed.rows as usize } else { 0 };
    if packed.scales.len() != scales {
        return refuse(format!("{} scales, {scales} expected", packed.scales.len()));
    }
    let values = numbers(packed, width);
    // Without a branch in the loop, so that it runs at the speed of memory.
    if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
        return Ok(values);
    }
    let at = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
    refuse(format!("number {at} is not finite"))
}

fn numbers(packed: &Activations, width: usize) -> Vec<f32> {
    match packed.encoding() {
        Encoding::Bf16 => packed.data.as_chunks().0.iter().map(|&bytes| half::bf16::from_le_bytes(bytes).to_f32()).collect(),
        Encoding::Int8 => {
            let rows = packed.data.chunks_exact(width).zip(&packed.scales);
            rows.flat_map(|(row, &scale)| row.iter().map(move |&byte| f32::from(byte as i8) * scale)).collect()
        }
        Encoding::F32 | Encoding::Unspecified => packed.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn numbers_of(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next() * 8.0 * next()).collect()
    }

    #[test]
    fn f32_is_exact_and_the_others_are_as_near_as_they_say() {
        let values = numbers_of(1, 6 * 32);
        assert_eq!(unpack("rows", &pack(values.clone(), 32, Encoding::F32), 32).unwrap(), values);
        let bf16 = unpack("rows", &pack(values.clone(), 32, Encoding::Bf16), 32).unwrap();
        assert!(bf16.iter().zip(&values).all(|(a, b)| (a - b).abs() <= b.abs() / 256.0));
        let int8 = unpack("rows", &pack(values.clone(), 32, Encoding::Int8), 32).unwrap();
        for (a, b) in int8.chunks(32).zip(values.chunks(32)) {
            let step = b.iter().fold(0.0f32, |most, value| most.max(value.abs())) / 127.0;
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= step * 0.501));
        }
        let zeros = vec![0.0; 8];
        assert_eq!(unpack("rows", &pack(zeros.clone(), 4, Encoding::Int8), 4).unwrap(), zeros);
    }

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let good = pack(numbers_of(2, 8), 4, Encoding::Int8);
        unpack("rows", &good, 4).unwrap();
        let bad = |change: &dyn Fn(&mut Activations)| {
            let mut packed = good.clone();
            change(&mut packed);
            unpack("rows", &packed, 4).unwrap_err().to_string()
        };
        for (error, said) in [
            (bad(&|p| p.width = 5), "rows of 5"),
            (bad(&|p| p.rows = 3), "8 bytes for 3 rows"),
            (bad(&|p| p.rows = u32::MAX), "8 bytes for 4294967295 rows"),
            (bad(&|p| p.encoding = 0), "encoding"),
            (bad(&|p| p.encoding = 9), "encoding"),
            (bad(&|p| p.scales.truncate(1)), "1 scales, 2"),
            (bad(&|p| p.scales[1] = f32::NAN), "number 4 is not finite"),
            (bad(&|p| p.encoding = Encoding::F32.into()), "8 bytes"),
        ] {
            assert!(error.starts_with("rows") && error.contains(said), "{error}");
        }
    }
}
