//! Bytes from strangers: no panic, no unbounded memory.
#![allow(clippy::unwrap_used)]

use std::fs;

use pixels::{Limits, PixelError, Processor, decode};
use proptest::prelude::*;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");

/// A PNG header that announces `width` x `height`, its checksum right, with a little data behind it.
fn bomb(width: u32, height: u32, color: u8, depth: u8) -> Vec<u8> {
    let mut data = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = width.to_be_bytes().to_vec();
    header.extend(height.to_be_bytes());
    header.extend([depth, color, 0, 0, 0]);
    chunk(&mut data, b"IHDR", &header);
    chunk(&mut data, b"IDAT", &[0x78, 0x9C, 0xED, 0xC1, 0x01, 0x01, 0, 0, 0, 0x80]);
    data
}

fn chunk(data: &mut Vec<u8>, kind: &[u8; 4], body: &[u8]) {
    data.extend((body.len() as u32).to_be_bytes());
    data.extend(kind);
    data.extend(body);
    data.extend(checksum(&[&kind[..], body].concat()).to_be_bytes());
}

fn checksum(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { (sum >> 1) ^ 0xEDB8_8320 } else { sum >> 1 })
    })
}

/// Most memory this process has ever had, bytes.
#[cfg(target_os = "linux")]
fn peak_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[cfg(target_os = "linux")]
#[test]
fn a_picture_of_a_billion_pixels_costs_nothing() {
    let before = peak_memory();
    for (width, height) in [(31_623, 31_623), (1_000_000_000, 1), (1, 1_000_000_000), (i32::MAX as u32, i32::MAX as u32)] {
        let result = decode(&bomb(width, height, 2, 8), &Limits::default());
        assert!(matches!(result, Err(PixelError::TooManyPixels { .. })), "{width} x {height}: {result:?}");
    }
    // The largest header that is allowed, on a file that ends at once.
    let result = decode(&bomb(8000, 8000, 6, 16), &Limits::default());
    assert!(matches!(result, Err(PixelError::Damaged { .. })), "{result:?}");
    let grown = peak_memory() - before;
    assert!(grown < 32 << 20, "{grown} bytes more");
}

fn samples() -> Vec<Vec<u8>> {
    let mut files: Vec<_> = fs::read_dir(DATA).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.retain(|path| path.extension().is_some_and(|e| e == "png" || e == "jpg" || e == "webp"));
    assert!(files.len() > 15);
    files.iter().map(|path| fs::read(path).unwrap()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is changed in a file, decoding returns: a picture within the limits or an error of one line.
    #[test]
    fn mutated_files_never_panic(
        which in any::<prop::sample::Index>(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
    ) {
        let samples = samples();
        let mut data = which.get(&samples).clone();
        for (at, value) in edits {
            let at = at.index(data.len());
            data[at] = value;
        }
        if let Some(cut) = cut {
            data.truncate(cut.index(data.len()));
        }
        let limits = Limits { max_pixels: 1 << 20, max_side: 4096, ..Limits::default() };
        match decode(&data, &limits) {
            Ok(image) => {
                prop_assert!(u64::from(image.width) * u64::from(image.height) <= limits.max_pixels);
                prop_assert_eq!(image.data.len() as u64, u64::from(image.width) * u64::from(image.height) * 3);
            }
            Err(error) => prop_assert_eq!(error.to_string().lines().count(), 1),
        }
    }

    /// Every size of picture has an image of the right size.
    #[test]
    fn every_size_is_processed(width in 1u32..300, height in 1u32..300, level: u8) {
        let image = pixels::Rgb { width, height, data: vec![level; (width * height * 3) as usize] };
        let plane = Processor::janus_original(32).process(&image).main;
        prop_assert_eq!(plane.levels.len(), 3 * 32 * 32);
        prop_assert_eq!(plane.values.len(), 3 * 32 * 32);
        let middle = plane.levels[16 * 32 + 16];
        prop_assert_eq!(middle, level);
    }
}
