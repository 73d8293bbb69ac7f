//! `preprocessor_config.json` applied to a picture: resize, pad to a square, rescale, normalise (spec: vision.md section 5).

use serde::Deserialize;
use serde_json::Value;

use crate::resize::{Filter, resize};
use crate::{PixelError, Rgb};

const CHANNELS: usize = 3;
/// The largest input side taken from a configuration, far above any published one (1024).
const LARGEST_SIDE: u32 = 8192;

/// Turns pictures into the tensors that a vision tower takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Processor {
    main: Target,
    /// A second, larger input that is made first; the main one is then made from it.
    high_res: Option<Target>,
    rounding: Rounding,
    /// Shortest side after resizing, pixels.
    min_size: u32,
}

/// One input of the tower.
#[derive(Debug, Clone, PartialEq)]
struct Target {
    /// Side of the square, pixels.
    size: u32,
    /// The field that says so.
    size_field: &'static str,
    filter: Filter,
    /// Colour of the padding.
    background: [u8; CHANNELS],
    /// Factor from levels to the unit interval; `None`: levels stay 0 to 255.
    rescale: Option<f64>,
    /// Mean and standard deviation; `None`: the tower normalises by itself.
    normalize: Option<([f32; CHANNELS], [f32; CHANNELS])>,
}

/// How the shorter side is made a whole number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rounding {
    /// To the nearest, halves to even: the processors of the transformers library.
    Nearest,
    /// Down: the processors of the original repositories.
    Truncate,
}

/// A picture ready for the tower.
#[derive(Debug, Clone, PartialEq)]
pub struct Processed {
    /// What the (low-resolution) tower takes.
    pub main: Plane,
    /// What the high-resolution tower of a hybrid model takes.
    pub high_res: Option<Plane>,
}

/// One square input.
#[derive(Debug, Clone, PartialEq)]
pub struct Plane {
    /// Side, pixels.
    pub size: usize,
    /// `[3, size, size]` before rescaling and normalisation.
    pub levels: Vec<u8>,
    /// `[3, size, size]` as the tower takes it.
    pub values: Vec<f32>,
}

impl Processor {
    /// Reads `preprocessor_config.json`. A setting that asks for something this crate does not do is refused by name, not ignored.
    ///
    /// `image_size` marks the files of the original repositories (sizes truncated), `size` those of the transformers library (rounded).
    pub fn from_config(json: &Value) -> Result<Self, PixelError> {
        let fields = Fields::deserialize(json).map_err(|error| config("(whole file)", error))?;
        for (field, value) in [("do_resize", fields.do_resize), ("do_pad", fields.do_pad)] {
            if value == Some(false) {
                return Err(config(field, "false is not supported"));
            }
        }
        let min_size = fields.min_size.unwrap_or(14).max(1);
        let (names, size, rounding) = match (&fields.size, fields.image_size) {
            (Some(size), _) => (&MAIN, size.side("size")?, Rounding::Nearest),
            (None, Some(size)) => (&ORIGINAL, size, Rounding::Truncate),
            (None, None) => return Err(config("size", "missing")),
        };
        let main = fields.target(names, size, fields.resample, (&fields.image_mean, &fields.image_std))?;
        let high_res = match &fields.high_res_size {
            None => None,
            Some(size) => {
                let statistics = (&fields.high_res_image_mean, &fields.high_res_image_std);
                Some(fields.target(&HIGH_RES, size.side("high_res_size")?, fields.high_res_resample, statistics)?)
            }
        };
        if let Some(target) = [Some(&main), high_res.as_ref()].into_iter().flatten().find(|target| target.size < min_size) {
            return Err(config(target.size_field, format!("{} is below min_size {min_size}", target.size)));
        }
        Ok(Self { main, high_res, rounding, min_size })
    }

    /// The processor of the original Janus repositories at another input side: sizes truncated, mean and deviation one half.
    pub fn janus_original(size: u32) -> Self {
        let half = [0.5; CHANNELS];
        let main = Target {
            size,
            size_field: ORIGINAL.size,
            filter: Filter::Bicubic,
            background: [127; CHANNELS],
            rescale: Some(1.0 / 255.0),
            normalize: Some((half, half)),
        };
        Self { main, high_res: None, rounding: Rounding::Truncate, min_size: 14.min(size) }
    }

    /// Side of the main input, pixels.
    pub fn size(&self) -> usize {
        self.main.size as usize
    }

    /// The field of `preprocessor_config.json` that holds the side of the main input.
    pub fn size_field(&self) -> &'static str {
        self.main.size_field
    }

    /// Side of the high-resolution input of a hybrid model, pixels.
    pub fn high_res_size(&self) -> Option<usize> {
        self.high_res.as_ref().map(|target| target.size as usize)
    }

    /// Everything that decides the result, as text: a part of cache keys.
    pub fn fingerprint(&self) -> String {
        format!("{self:?}")
    }

    /// Resizes, pads, rescales and normalises. Never fails: every picture with at least one pixel has an image.
    pub fn process(&self, image: &Rgb) -> Processed {
        match &self.high_res {
            None => Processed { main: self.main.plane(&self.fit(image, &self.main)), high_res: None },
            Some(target) => {
                let square = self.fit(image, target);
                let main = self.main.plane(&self.fit(&square, &self.main));
                Processed { main, high_res: Some(target.plane(&square)) }
            }
        }
    }

    /// The longer side becomes the target's, the shorter one keeps the proportions; the rest is padding, the picture in its middle.
    fn fit(&self, image: &Rgb, target: &Target) -> Rgb {
        let longest = f64::from(image.width.max(image.height));
        let scaled = |side: u32| {
            let (side, size) = (f64::from(side), f64::from(target.size));
            let length = match self.rounding {
                Rounding::Nearest => (side * (size / longest)).round_ties_even(),
                Rounding::Truncate => (side / longest * size).trunc(),
            };
            (length as u32).max(self.min_size)
        };
        pad(&resize(image, scaled(image.width), scaled(image.height), target.filter), target.size, target.background)
    }
}

impl Target {
    fn plane(&self, square: &Rgb) -> Plane {
        let pixels = square.data.len() / CHANNELS;
        let mut levels = vec![0; square.data.len()]; // [3, size, size]
        for (index, pixel) in square.data.chunks_exact(CHANNELS).enumerate() {
            for (channel, level) in pixel.iter().enumerate() {
                levels[channel * pixels + index] = *level;
            }
        }
        let mut values = Vec::with_capacity(levels.len());
        for (channel, levels) in levels.chunks_exact(pixels).enumerate() {
            let table: Vec<f32> = (0..=255).map(|level| self.value(level, channel)).collect();
            values.extend(levels.iter().map(|level| table[usize::from(*level)]));
        }
        Plane { size: self.size as usize, levels, values }
    }

    /// What the tower sees of a level. Precisions as in the reference: the product in f64, the rest in f32.
    fn value(&self, level: u8, channel: usize) -> f32 {
        let value = match self.rescale {
            Some(factor) => (f64::from(level) * factor) as f32,
            None => f32::from(level),
        };
        match self.normalize {
            Some((mean, deviation)) => (value - mean[channel]) / deviation[channel],
            None => value,
        }
    }
}

/// A square of `size` pixels a side with the picture in its middle (half a pixel up or left when the rest is odd).
fn pad(image: &Rgb, size: u32, background: [u8; CHANNELS]) -> Rgb {
    let (left, top) = ((size - image.width) as usize / 2, (size - image.height) as usize / 2);
    let stride = size as usize * CHANNELS;
    let mut data = background.repeat(size as usize * size as usize);
    for (y, row) in image.data.chunks_exact(image.width as usize * CHANNELS).enumerate() {
        data[(top + y) * stride + left * CHANNELS..][..row.len()].copy_from_slice(row);
    }
    Rgb { width: size, height: size, data }
}

/// How the fields of one input are called.
struct Names {
    size: &'static str,
    resample: &'static str,
    mean: &'static str,
    deviation: &'static str,
}

const MAIN: Names = Names { size: "size", resample: "resample", mean: "image_mean", deviation: "image_std" };
const ORIGINAL: Names = Names { size: "image_size", ..MAIN };
const HIGH_RES: Names =
    Names { size: "high_res_size", resample: "high_res_resample", mean: "high_res_image_mean", deviation: "high_res_image_std" };

/// The fields of `preprocessor_config.json` that count here.
#[derive(Debug, Deserialize)]
struct Fields {
    image_size: Option<u32>,
    size: Option<Size>,
    high_res_size: Option<Size>,
    resample: Option<u32>,
    high_res_resample: Option<u32>,
    min_size: Option<u32>,
    do_resize: Option<bool>,
    do_pad: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    rescale_factor: Option<f64>,
    image_mean: Option<Vec<f64>>,
    image_std: Option<Vec<f64>>,
    high_res_image_mean: Option<Vec<f64>>,
    high_res_image_std: Option<Vec<f64>>,
}

#[derive(Debug, Deserialize)]
struct Size {
    height: u32,
    width: u32,
}

impl Size {
    fn side(&self, field: &'static str) -> Result<u32, PixelError> {
        if self.height == self.width {
            Ok(self.height)
        } else {
            Err(config(field, format!("{} x {} is not square", self.height, self.width)))
        }
    }
}

impl Fields {
    fn target(
        &self,
        names: &Names,
        size: u32,
        resample: Option<u32>,
        (mean, deviation): (&Option<Vec<f64>>, &Option<Vec<f64>>),
    ) -> Result<Target, PixelError> {
        if !(1..=LARGEST_SIDE).contains(&size) {
            return Err(config(names.size, format!("{size} is not in 1..={LARGEST_SIDE}")));
        }
        let filter = match resample.unwrap_or(3) {
            2 => Filter::Bilinear,
            3 => Filter::Bicubic,
            other => return Err(config(names.resample, format!("{other} is not supported: 2 (bilinear) or 3 (bicubic)"))),
        };
        let statistics = match (mean, deviation) {
            (None, None) => None,
            (Some(mean), Some(deviation)) => Some((triple(names.mean, mean)?, triple(names.deviation, deviation)?)),
            _ => return Err(config(names.deviation, format!("{} and {} belong together", names.mean, names.deviation))),
        };
        // The reference computes the colour from the mean whatever `background_color` says.
        let background = statistics.map_or([127; CHANNELS], |(mean, _)| mean.map(|value| (value * 255.0) as u8));
        let normalize = match (self.do_normalize.unwrap_or(true), statistics) {
            (false, _) => None,
            (true, Some((mean, deviation))) if deviation.iter().all(|value| *value != 0.0) => {
                Some((mean.map(|value| value as f32), deviation.map(|value| value as f32)))
            }
            (true, _) => return Err(config(names.deviation, "needed (and not zero) because do_normalize is true")),
        };
        let rescale = self.do_rescale.unwrap_or(true).then_some(self.rescale_factor.unwrap_or(1.0 / 255.0));
        Ok(Target { size, size_field: names.size, filter, background, rescale, normalize })
    }
}

fn triple(field: &'static str, values: &[f64]) -> Result<[f64; CHANNELS], PixelError> {
    match values {
        [r, g, b] if values.iter().all(|value| value.is_finite()) => Ok([*r, *g, *b]),
        _ => Err(config(field, "three finite numbers expected")),
    }
}

fn config(field: &'static str, reason: impl std::fmt::Display) -> PixelError {
    PixelError::Config { field, reason: reason.to_string() }
}
