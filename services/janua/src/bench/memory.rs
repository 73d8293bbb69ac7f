use std::fs;

/// Resident memory of this process, in bytes. File pages count while they are mapped in, wherever else they are cached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Now.
    pub resident: u64,
    /// Of that, what is not in any file.
    pub anonymous: u64,
    /// The most there ever was.
    pub peak: u64,
}

impl Memory {
    /// As Linux tells it; zeros elsewhere.
    pub fn now() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/status").unwrap_or_default())
    }

    fn parse(status: &str) -> Self {
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
        };
        let bytes = |name| of(name).unwrap_or(0);
        Self { resident: bytes("VmRSS"), anonymous: bytes("RssAnon"), peak: bytes("VmHWM") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_is_read() {
        let text = "Name:\tjanua\nVmPeak:\t 9 kB\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\nRssAnon:\t     512 kB\n";
        assert_eq!(Memory::parse(text), Memory { resident: 1 << 20, anonymous: 512 << 10, peak: 2 << 20 });
        assert_eq!(Memory::parse(""), Memory::default());
    }
}
