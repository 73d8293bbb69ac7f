use crate::{Checkpoint, CheckpointError, Dtype, TensorView};

/// Bytes looked at between two reports of progress: long enough to cost nothing, short enough for a smooth bar. A multiple of every size.
const BLOCK: usize = 4 << 20;

/// The smallest page of the systems we run on.
const PAGE: usize = 4096;

impl Checkpoint {
    /// Reads every weight once, so that the first request does not wait for the disk, and refuses NaN and infinity by the tensor's name.
    /// `progress` is told how many bytes of tensors are done, [`Checkpoint::total_bytes`] at the end.
    ///
    /// What has been read stays in the system's cache but not in this process: not every weight is used, and some are used as a copy.
    pub fn scan(&self, progress: &mut dyn FnMut(u64)) -> Result<(), CheckpointError> {
        self.scan_some(&|_| true, progress)
    }

    /// As [`Checkpoint::scan`], for the tensors whose names are `wanted`; the end is [`Checkpoint::bytes_of`] them.
    pub fn scan_some(&self, wanted: &dyn Fn(&str) -> bool, progress: &mut dyn FnMut(u64)) -> Result<(), CheckpointError> {
        let mut done = 0;
        for tensor in self.in_file_order().into_iter().filter(|tensor| wanted(tensor.name)) {
            tensor.file.read_ahead(tensor.range.start, tensor.range.end);
            for (number, block) in tensor.data.chunks(BLOCK).enumerate() {
                if !all_finite(tensor.dtype, block) {
                    return Err(refusal(&tensor, number * BLOCK, block));
                }
                let begin = tensor.range.start + number * BLOCK;
                tensor.file.release(begin, begin + block.len());
                done += block.len() as u64;
                progress(done);
            }
        }
        Ok(())
    }
}

/// An element is NaN or infinite exactly when all bits of its exponent are set. The loops have no branch, so that they run at the speed
/// of memory.
fn all_finite(dtype: Dtype, data: &[u8]) -> bool {
    match dtype {
        Dtype::F16 => !any(data, |bytes| u16::from_le_bytes(bytes) & 0x7C00 == 0x7C00),
        Dtype::BF16 => !any(data, |bytes| u16::from_le_bytes(bytes) & 0x7F80 == 0x7F80),
        Dtype::F32 => !any(data, |bytes| u32::from_le_bytes(bytes) & 0x7F80_0000 == 0x7F80_0000),
        Dtype::F64 => !any(data, |bytes| u64::from_le_bytes(bytes) & 0x7FF0_0000_0000_0000 == 0x7FF0_0000_0000_0000),
        _ => {
            std::hint::black_box(data.chunks(PAGE).fold(0, |sum, page| sum ^ page[0])); // only to have the pages read
            true
        }
    }
}

fn any<const N: usize>(data: &[u8], is_bad: impl Fn([u8; N]) -> bool) -> bool {
    data.as_chunks::<N>().0.iter().fold(false, |found, &bytes| found | is_bad(bytes))
}

fn refusal(tensor: &TensorView<'_>, offset: usize, block: &[u8]) -> CheckpointError {
    let size = tensor.dtype.size();
    let position = block.chunks(size).position(|element| !all_finite(tensor.dtype, element)).unwrap_or(0);
    let element = offset / size + position;
    CheckpointError::tensor(&tensor.file.path, tensor.name, format!("element {element} is NaN or infinite"))
}
