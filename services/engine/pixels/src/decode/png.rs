use std::io::Cursor;

use ::png::{DecodeOptions, Decoder, Limits as PngLimits, Reader, Transformations};

use super::{Limits, Rgb, damaged, to_rgb};
use crate::PixelError;

const FORMAT: &str = "PNG";

/// Any PNG: palettes and small depths are expanded, 16-bit channels cut to 8.
pub(super) fn decode(data: &[u8], limits: &Limits) -> Result<Rgb, PixelError> {
    let mut options = DecodeOptions::default();
    options.set_ignore_text_chunk(true);
    options.set_ignore_iccp_chunk(true);
    let mut decoder = Decoder::new_with_options(Cursor::new(data), options);
    decoder.set_limits(PngLimits { bytes: limits.memory() });
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let (width, height) = decoder.read_header_info().map(|info| info.size()).map_err(|error| damaged(FORMAT, error))?;
    limits.check(width, height)?;

    let mut reader = decoder.read_info().map_err(|error| damaged(FORMAT, error))?;
    let interlaced = reader.info().interlaced;
    let data = if interlaced { whole(&mut reader)? } else { row_by_row(&mut reader)? };
    if data.len() as u64 != u64::from(width) * u64::from(height) * 3 {
        return Err(damaged(FORMAT, "rows are missing"));
    }
    Ok(Rgb { width, height, data })
}

/// Memory grows with the rows that are really in the file, so a large header on a short file costs nothing.
fn row_by_row(reader: &mut Reader<Cursor<&[u8]>>) -> Result<Vec<u8>, PixelError> {
    let channels = reader.output_color_type().0.samples();
    let mut data = Vec::new();
    while let Some(row) = reader.next_row().map_err(|error| damaged(FORMAT, error))? {
        match channels {
            1 | 2 => data.extend(row.data().chunks_exact(channels).flat_map(|pixel| [pixel[0]; 3])),
            3 => data.extend_from_slice(row.data()),
            _ => data.extend(row.data().chunks_exact(channels).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]])),
        }
    }
    Ok(data)
}

fn whole(reader: &mut Reader<Cursor<&[u8]>>) -> Result<Vec<u8>, PixelError> {
    let channels = reader.output_color_type().0.samples();
    let size = reader.output_buffer_size().ok_or_else(|| damaged(FORMAT, "the picture does not fit into memory"))?;
    let mut data = vec![0; size];
    reader.next_frame(&mut data).map_err(|error| damaged(FORMAT, error))?;
    Ok(to_rgb(data, channels))
}
