//! What is checked before a batch may wait: after this it can be computed.

use std::collections::BTreeSet;

use domain::Invalid;
use layers::Share;
use models::ExpertShape;
use placement::ExpertRange;
use proto::v1;
use proto::v1::activations::Encoding;
use wire::activations::unpack;

use crate::error::Failure;

/// Most rows of a batch.
const MAX_ROWS: usize = 1 << 16;
/// Most numbers that the experts of a batch may compute: as f32 they take 1 GiB until they are sent.
const MAX_NUMBERS: usize = 1 << 28;

/// A batch that is valid for the model and for what is held.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Of the decoder.
    pub layer: usize,
    /// The same layer, counted among those that have experts.
    pub position: usize,
    /// How many rows `x` has.
    pub rows: usize,
    /// `[rows, hidden]`
    pub x: Vec<f32>,
    /// Of the rows, and of the answer.
    pub encoding: Encoding,
    /// By ascending expert.
    pub shares: Vec<Share>,
    /// Whether the sum over the experts is asked for, or each expert's output.
    pub weighted: bool,
}

/// What a batch is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    pub shape: &'a ExpertShape,
    pub held: &'a BTreeSet<usize>,
    pub shard: ExpertRange,
}

impl Batch {
    /// Rows of its outputs.
    pub fn outputs(&self) -> usize {
        if self.weighted { self.rows } else { self.shares.iter().map(|share| share.rows.len()).sum() }
    }

    /// Checks a message. Cheap checks come first: rows are unpacked when everything else is right.
    pub fn read(message: &v1::ExpertBatch, place: Place<'_>) -> Result<Self, Failure> {
        let layer = message.layer as usize;
        let no_experts = |_| Invalid::new("layer", format!("{layer} has no experts, only {:?} have", place.shape.layers));
        let position = place.shape.layers.binary_search(&layer).map_err(no_experts)?;
        let rows = message.rows.as_ref().ok_or_else(|| Invalid::new("rows", "missing"))?;
        if rows.rows as usize > MAX_ROWS {
            return Err(Invalid::new("rows", format!("{} rows, at most {MAX_ROWS} are taken", rows.rows)).into());
        }
        experts(&message.experts, place.shape.experts)?;
        counts(message)?;
        weights(message)?;
        size(message, place.shape.hidden)?;
        let shares = shares(message, rows.rows as usize)?;
        if let Some(share) = shares.iter().find(|share| !place.held.contains(&share.expert)) {
            return Err(Failure::NotHeld { expert: share.expert, shard: place.shard });
        }
        let x = unpack("rows", rows, place.shape.hidden)?;
        let weighted = !message.weights.is_empty();
        Ok(Self { layer, position, rows: rows.rows as usize, x, encoding: rows.encoding(), shares, weighted })
    }
}

/// At least one, ascending, each in the model.
fn experts(experts: &[u32], count: usize) -> Result<(), Invalid> {
    if experts.is_empty() {
        return Err(Invalid::new("experts", "none is named"));
    }
    if let Some(at) = (1..experts.len()).find(|&at| experts[at] <= experts[at - 1]) {
        return Err(Invalid::new(format!("experts[{at}]"), format!("{} after {}, they must ascend", experts[at], experts[at - 1])));
    }
    match experts.last() {
        Some(&last) if last as usize >= count => {
            Err(Invalid::new(format!("experts[{}]", experts.len() - 1), format!("{last}: the model has {count} experts")))
        }
        _ => Ok(()),
    }
}

/// One per expert, at least 1, together as many as there are places.
fn counts(message: &v1::ExpertBatch) -> Result<(), Invalid> {
    let v1::ExpertBatch { experts, counts, places, .. } = message;
    if counts.len() != experts.len() {
        return Err(Invalid::new("counts", format!("{} counts for {} experts", counts.len(), experts.len())));
    }
    if let Some(at) = counts.iter().position(|&count| count == 0) {
        return Err(Invalid::new(format!("counts[{at}]"), format!("expert {} has no rows", experts[at])));
    }
    let total: u64 = counts.iter().map(|&count| u64::from(count)).sum();
    if total != places.len() as u64 {
        return Err(Invalid::new("places", format!("{} places, the counts add up to {total}", places.len())));
    }
    Ok(())
}

/// None, or one per place.
fn weights(message: &v1::ExpertBatch) -> Result<(), Invalid> {
    let v1::ExpertBatch { weights, places, .. } = message;
    if !weights.is_empty() && weights.len() != places.len() {
        return Err(Invalid::new("weights", format!("{} weights for {} places", weights.len(), places.len())));
    }
    match weights.iter().position(|weight| !weight.is_finite()) {
        Some(at) => Err(Invalid::new(format!("weights[{at}]"), "not finite")),
        None => Ok(()),
    }
}

/// Outputs must fit into memory.
fn size(message: &v1::ExpertBatch, hidden: usize) -> Result<(), Invalid> {
    let places = message.places.len();
    if places.saturating_mul(hidden) > MAX_NUMBERS {
        return Err(Invalid::new("places", format!("{places} rows of {hidden} numbers, at most {MAX_NUMBERS} numbers are computed")));
    }
    Ok(())
}

/// The rows of each expert, which must ascend and be there.
fn shares(message: &v1::ExpertBatch, rows: usize) -> Result<Vec<Share>, Invalid> {
    let (mut shares, mut begin) = (Vec::with_capacity(message.experts.len()), 0);
    for (&expert, &count) in message.experts.iter().zip(&message.counts) {
        let end = begin + count as usize;
        let places = &message.places[begin..end];
        let wrong = |at: usize| places[at] as usize >= rows || (at > 0 && places[at] <= places[at - 1]);
        if let Some(at) = (0..places.len()).find(|&at| wrong(at)) {
            let reason = format!("row {} of {rows} for expert {expert}, its rows must be there and ascend", places[at]);
            return Err(Invalid::new(format!("places[{}]", begin + at), reason));
        }
        let weights = message.weights.get(begin..end).unwrap_or_default().to_vec();
        shares.push(Share { expert: expert as usize, rows: places.iter().map(|&row| row as usize).collect(), weights });
        begin = end;
    }
    Ok(shares)
}
