//! Model cards.

use domain::{Canvas, CodeGrid, ImageSampling, Invalid, LatentGrid, ModelCard, Sampling};
use proto::v1;

use crate::sampling;

/// `DescribeResponse` from the wire.
pub fn card(response: v1::DescribeResponse) -> Result<ModelCard, Invalid> {
    let text = sampling::text(response.default_sampling, &Sampling::default())?;
    let image = sampling::image(response.default_image_sampling, &ImageSampling::default())?;
    let codes = response.code_grid.map(|grid| {
        let [rows, columns, codebook_size] = [grid.rows, grid.columns, grid.codebook_size].map(|size| size as usize);
        Canvas::Codes(CodeGrid { rows, columns, codebook_size })
    });
    let latent = response.latent_grid.map(|grid| {
        let [channels, rows, columns, positions] = [grid.channels, grid.rows, grid.columns, grid.positions].map(|size| size as usize);
        Canvas::Latent(LatentGrid { channels, rows, columns, positions })
    });
    Ok(ModelCard {
        family: response.family,
        context_length: response.context_length as usize,
        vocabulary_size: response.vocabulary_size as usize,
        hidden_size: response.hidden_size as usize,
        canvas: codes.or(latent),
        tokens_per_image: response.tokens_per_image.map(|tokens| tokens as usize),
        default_sampling: text.sampling,
        default_image_sampling: image.sampling,
    })
}

/// `DescribeResponse` for the wire.
pub fn to_card(card: &ModelCard) -> v1::DescribeResponse {
    v1::DescribeResponse {
        family: card.family.clone(),
        context_length: card.context_length as u32,
        vocabulary_size: card.vocabulary_size as u32,
        hidden_size: card.hidden_size as u32,
        code_grid: card.code_grid().map(|grid| v1::CodeGrid {
            rows: grid.rows as u32,
            columns: grid.columns as u32,
            codebook_size: grid.codebook_size as u32,
        }),
        tokens_per_image: card.tokens_per_image.map(|tokens| tokens as u32),
        default_sampling: Some(sampling::to_text(&card.default_sampling)),
        default_image_sampling: Some(match card.canvas {
            Some(Canvas::Latent(_)) => sampling::to_flow(&card.default_image_sampling),
            Some(Canvas::Codes(_)) | None => sampling::to_image(&card.default_image_sampling),
        }),
        latent_grid: card.latent_grid().map(|grid| v1::LatentGrid {
            channels: grid.channels as u32,
            rows: grid.rows as u32,
            columns: grid.columns as u32,
            positions: grid.positions as u32,
        }),
    }
}
