/// Why a picture or a processor's configuration cannot be used. `Display` is a sentence for whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PixelError {
    /// No known signature at the start of the bytes.
    #[error("not a PNG, JPEG or WebP picture")]
    UnknownFormat,
    /// The file is larger than the limit.
    #[error("a picture file of {bytes} bytes, at most {limit} are taken")]
    TooManyBytes { bytes: usize, limit: usize },
    /// The header announces more pixels than the limits allow.
    #[error("a picture of {width} x {height} pixels, at most {max_side} a side and {max_pixels} in all are taken")]
    TooManyPixels { width: u32, height: u32, max_side: u32, max_pixels: u64 },
    /// Truncated, corrupt, or a variant that the decoder does not know.
    #[error("a {format} file that cannot be decoded: {reason}")]
    Damaged { format: &'static str, reason: String },
    /// A field of `preprocessor_config.json` is missing or has a value that means another preprocessing.
    #[error("preprocessor_config.json: field {field}: {reason}")]
    Config { field: &'static str, reason: String },
    /// The picture could not be written.
    #[error("a {format} file could not be written: {reason}")]
    Encode { format: &'static str, reason: String },
}
