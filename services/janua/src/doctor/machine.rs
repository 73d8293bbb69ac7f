use cpu::Isa;

use super::Finding;

/// Room for activations, KV cache and the program beside the weights.
const HEADROOM: u64 = 1 << 30;

/// Which kernels will run.
pub fn processor() -> Finding {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    match Isa::from_environment() {
        Ok(isa) => {
            let best = Isa::detect();
            let note =
                if isa == best { String::new() } else { format!(" (this processor has {best}, {} says otherwise)", cpu::ISA_VARIABLE) };
            Finding::fine("processor", format!("{} · {cores} cores · {isa} kernels{note}", std::env::consts::ARCH))
        }
        Err(error) => Finding::problem("processor", error.to_string(), format!("unset {}", cpu::ISA_VARIABLE)),
    }
}

/// The library that runs vision towers and image decoders.
pub fn onnx_runtime() -> Finding {
    match backend_onnx::runtime_version() {
        Ok(version) => Finding::fine("onnx runtime", version),
        Err(error) => Finding::problem(
            "onnx runtime",
            error.to_string(),
            format!("run `make deps`, or set {} to libonnxruntime.so", backend_onnx::LIBRARY_VARIABLE),
        ),
    }
}

/// Whether `weights` bytes and some headroom fit into what is free.
pub fn memory(weights: u64) -> Finding {
    let Some(free) = available() else {
        return Finding::fine("memory", "unknown on this system");
    };
    let fact = format!("{} available, {} of weights", size(free), size(weights));
    if weights + HEADROOM <= free {
        Finding::fine("memory", fact)
    } else {
        let remedy = format!("free {}, or serve fewer models here", size(weights + HEADROOM - free));
        Finding::problem("memory", fact, remedy)
    }
}

/// Bytes that can be taken without swapping, as Linux reckons.
fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = (0..units.len() - 1).find(|power| bytes >> (10 * (power + 1)) == 0).unwrap_or(units.len() - 1);
    let value = bytes as f64 / (1u64 << (10 * power)) as f64;
    if power == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[power]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, expected) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 30, "1.0 GiB"), (3 << 41, "6.0 TiB")] {
            assert_eq!(size(bytes), expected);
        }
    }
}
