//! Every kind of picture file against what the reference decoder makes of it (`tests/data/make.py`).
#![allow(clippy::unwrap_used)]

use std::fs;

use pixels::{Limits, PixelError, Rgb, decode};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");
const WIDTH: u32 = 29;
const HEIGHT: u32 = 23;

fn file(name: &str) -> Vec<u8> {
    fs::read(format!("{DATA}{name}")).unwrap()
}

fn read(data: &[u8]) -> Result<Rgb, PixelError> {
    decode(data, &Limits::default())
}

/// Largest difference to the reference, in levels.
fn difference(name: &str) -> u8 {
    let image = read(&file(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = file(&format!("{name}.rgb"));
    assert_eq!((image.width, image.height, image.data.len()), (WIDTH, HEIGHT, expected.len()), "{name}");
    image.data.iter().zip(&expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap()
}

#[test]
fn lossless_files_are_exact() {
    for name in [
        "rgb16.png",
        "gray16.png",
        "gray_alpha16.png",
        "rgba.png",
        "palette_transparent.png",
        "one_bit.png",
        "animated.png",
        "interlaced.png",
        "interlaced_rgba16.png",
        "lossless.webp",
        "alpha.webp",
        "animated.webp",
    ] {
        assert_eq!(difference(name), 0, "{name}");
    }
}

/// Decoders round the cosine transform and the colour conversion differently; where chroma is stored at half size, they also interpolate differently.
#[test]
fn lossy_files_are_close() {
    for (name, levels) in [
        ("rgb.jpg", 3),
        ("progressive.jpg", 3),
        ("gray.jpg", 1),
        ("cmyk.jpg", 3),
        ("ycck.jpg", 3),
        ("turned.jpg", 3),
        ("restarts.jpg", 3),
        ("subsampled.jpg", 6),
        ("lossy.webp", 6),
    ] {
        let found = difference(name);
        assert!(found <= levels, "{name}: {found} levels");
    }
}

#[test]
fn bytes_between_header_segments_are_skipped() {
    let mut data = file("rgb.jpg");
    let at = 4 + usize::from(u16::from_be_bytes([data[4], data[5]])); // after the first segment
    data.splice(at..at, [0x12; 9]);
    assert_eq!(read(&data).unwrap(), read(&file("rgb.jpg")).unwrap());
}

#[test]
fn other_bytes_are_not_a_picture() {
    for data in [&b""[..], b"hello", b"\x89PNG", b"GIF89a\x01\0\x01\0", b"RIFF\0\0\0\0WAVE", &[0xFF, 0xD8], &[0; 1000]] {
        assert_eq!(read(data), Err(PixelError::UnknownFormat), "{data:?}");
    }
}

/// Wherever a file is cut, the answer is an error, never a picture that is partly invented.
#[test]
fn a_truncated_file_is_refused() {
    let names = [
        "rgb.jpg",
        "subsampled.jpg",
        "progressive.jpg",
        "gray.jpg",
        "cmyk.jpg",
        "restarts.jpg",
        "rgb16.png",
        "interlaced.png",
        "one_bit.png",
        "lossless.webp",
        "lossy.webp",
    ];
    for name in names {
        let data = file(name);
        // What may be missing without losing a pixel: the end chunk of a PNG with the checksum before it, the padding byte of a WebP.
        let spare = if name.ends_with(".png") { 12 + 8 } else { usize::from(name.ends_with(".webp")) };
        let needed = data.len() - spare;
        for length in 0..needed {
            let result = read(&data[..length]);
            assert!(result.is_err(), "{name} cut to {length} of {} bytes was taken", data.len());
        }
    }
}

#[test]
fn limits_are_checked() {
    let data = file("rgb.jpg");
    let limits = Limits { max_bytes: data.len() - 1, ..Limits::default() };
    assert_eq!(decode(&data, &limits), Err(PixelError::TooManyBytes { bytes: data.len(), limit: data.len() - 1 }));
    for name in ["rgb.jpg", "rgba.png", "lossy.webp", "lossless.webp", "alpha.webp"] {
        let exact = Limits { max_pixels: u64::from(WIDTH * HEIGHT), max_side: WIDTH, ..Limits::default() };
        assert!(decode(&file(name), &exact).is_ok(), "{name}");
        for limits in [Limits { max_side: WIDTH - 1, ..exact }, Limits { max_pixels: exact.max_pixels - 1, ..exact }] {
            assert!(matches!(decode(&file(name), &limits), Err(PixelError::TooManyPixels { .. })), "{name}");
        }
    }
}
