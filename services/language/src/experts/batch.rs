//! Shares as a batch on the wire, and its outputs as terms of a sum.

use std::collections::BTreeMap;

use domain::Invalid;
use layers::{Rows, Share, Term};
use proto::v1;
use proto::v1::activations::Encoding;
use wire::activations;

/// The rows of a step, rounded once for all shards.
pub(super) struct Packed {
    rows: v1::Activations,
    width: usize,
    encoding: Encoding,
}

impl Packed {
    pub fn new(rows: Rows, encoding: Encoding) -> Self {
        Self { rows: activations::pack(rows.values, rows.width, encoding), width: rows.width, encoding }
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// Some of the rows, ascending.
    fn gather(&self, wanted: &[usize]) -> v1::Activations {
        if wanted.len() == self.rows.rows as usize {
            return self.rows.clone(); // all of them: the bytes are shared
        }
        let stride = self.rows.data.len() / (self.rows.rows as usize).max(1);
        let mut data = Vec::with_capacity(wanted.len() * stride);
        wanted.iter().for_each(|row| data.extend_from_slice(&self.rows.data[row * stride..(row + 1) * stride]));
        let scales = if self.rows.scales.is_empty() { Vec::new() } else { wanted.iter().map(|&row| self.rows.scales[row]).collect() };
        v1::Activations { rows: wanted.len() as u32, width: self.rows.width, encoding: self.rows.encoding, data: data.into(), scales }
    }
}

/// A batch of shares, which are by ascending expert.
///
/// With exact activations every expert's output comes back by itself and is weighted here, in the order of a model that is whole: to the last
/// bit the same. With rounded ones the shard adds up first, which is rounded once and takes fewer bytes.
pub(super) fn build<'s>(layer: usize, rows: &Packed, shares: impl Iterator<Item = &'s Share> + Clone) -> v1::ExpertBatch {
    let mut wanted: Vec<usize> = shares.clone().flat_map(|share| share.rows.iter().copied()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let place: BTreeMap<usize, u32> = wanted.iter().enumerate().map(|(place, &row)| (row, place as u32)).collect();
    let weights =
        if rows.encoding == Encoding::F32 { Vec::new() } else { shares.clone().flat_map(|share| share.weights.clone()).collect() };
    v1::ExpertBatch {
        id: 0,
        layer: layer as u32,
        rows: Some(rows.gather(&wanted)),
        experts: shares.clone().map(|share| share.expert as u32).collect(),
        counts: shares.clone().map(|share| share.rows.len() as u32).collect(),
        places: shares.flat_map(|share| share.rows.iter().map(|row| place[row])).collect(),
        weights,
        traceparent: String::new(),
    }
}

/// Rows of the outputs of a batch, all pieces together.
pub(super) fn outputs(batch: &v1::ExpertBatch) -> usize {
    if batch.weights.is_empty() { batch.places.len() } else { batch.rows.as_ref().map_or(0, |rows| rows.rows as usize) }
}

/// The outputs of a batch of these shares, in pieces: a term for each of them or, when the shard has added up, one for all.
pub(super) fn read(
    batch: &v1::ExpertBatch,
    shares: &[&Share],
    pieces: BTreeMap<usize, v1::Activations>,
    width: usize,
) -> Result<Vec<Term<Vec<f32>>>, Invalid> {
    let mut pieces = Pieces { pieces: pieces.into_iter(), width, rest: Vec::new(), taken: 0 };
    if !batch.weights.is_empty() {
        let mut rows: Vec<usize> = shares.iter().flat_map(|share| share.rows.iter().copied()).collect();
        rows.sort_unstable();
        rows.dedup();
        return Ok(vec![Term { weights: vec![1.0; rows.len()], values: pieces.take(rows.len())?, rows }]);
    }
    let term =
        |share: &&Share| Ok(Term { rows: share.rows.clone(), weights: share.weights.clone(), values: pieces.take(share.rows.len())? });
    shares.iter().map(term).collect()
}

/// Outputs on their way from pieces to shares. As a rule a piece is a share, and its numbers are copied once.
struct Pieces<I> {
    pieces: I,
    width: usize,
    /// Numbers of the last piece that are not taken yet.
    rest: Vec<f32>,
    /// Rows of all pieces so far.
    taken: usize,
}

impl<I: Iterator<Item = (usize, v1::Activations)>> Pieces<I> {
    /// The next `rows` rows.
    fn take(&mut self, rows: usize) -> Result<Vec<f32>, Invalid> {
        let mut values = std::mem::take(&mut self.rest);
        while values.len() < rows * self.width {
            let refuse = |found: &str| Invalid::new("outputs.first", format!("{found} after {} rows", self.taken));
            let (first, piece) = self.pieces.next().ok_or_else(|| refuse("nothing"))?;
            if first != self.taken {
                return Err(refuse(&format!("row {first}")));
            }
            let numbers = activations::unpack("outputs.rows", &piece, self.width)?;
            self.taken += numbers.len() / self.width;
            if values.is_empty() { values = numbers } else { values.extend(numbers) }
        }
        self.rest = values.split_off(rows * self.width);
        Ok(values)
    }
}
