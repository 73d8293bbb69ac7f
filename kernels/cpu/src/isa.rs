//! Which instruction set is used: detected once, forced by `JANUA_ISA`, fixed in a table of functions.

use std::{fmt, str::FromStr};

use crate::{Dtype, add, attention, gelu, heads, latent_attention, matmul, rms_norm, rope, silu_mul, softmax, widen};

/// Environment variable that forces an instruction set by name (`scalar`, `avx2`), for comparisons and for machines that misreport.
pub const ISA_VARIABLE: &str = "JANUA_ISA";

/// An instruction set that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust; the reference.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
}

/// The functions of one instruction set. Calling one is safe because a table is only handed out on a CPU that has the set.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub isa: Isa,
    pub matmul: matmul::Kernel,
    pub heads_transposed: heads::Kernel,
    pub attention: attention::Kernel,
    pub latent_attention: latent_attention::Kernel,
    pub rms_norm: rms_norm::Kernel,
    pub rope: rope::Kernel,
    pub rope_neighbours: rope::Kernel,
    pub silu_mul: fn(&mut [f32], &[f32]),
    pub gelu: fn(&mut [f32]),
    pub add: fn(&mut [f32], &[f32]),
    pub softmax: fn(&mut [f32]),
    pub widen: fn(Dtype, &[u8], &mut [f32]),
}

static SCALAR: Kernels = Kernels {
    isa: Isa::Scalar,
    matmul: matmul::scalar::KERNEL,
    heads_transposed: heads::scalar::transposed,
    attention: attention::scalar::attend,
    latent_attention: latent_attention::scalar::attend,
    rms_norm: rms_norm::scalar::rms_norm,
    rope: rope::scalar::rope,
    rope_neighbours: rope::scalar::rope_neighbours,
    silu_mul: silu_mul::scalar::silu_mul,
    gelu: gelu::scalar::gelu,
    add: add::scalar::add,
    softmax: softmax::scalar::softmax,
    widen: widen::scalar::widen,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Kernels = Kernels {
    isa: Isa::Avx2,
    matmul: matmul::avx2::KERNEL,
    heads_transposed: heads::avx2::transposed,
    attention: attention::avx2::attend,
    latent_attention: latent_attention::avx2::attend,
    rms_norm: rms_norm::avx2::rms_norm,
    rope: rope::avx2::rope,
    rope_neighbours: rope::avx2::rope_neighbours,
    silu_mul: silu_mul::avx2::silu_mul,
    gelu: gelu::avx2::gelu,
    add: add::avx2::add,
    softmax: softmax::avx2::softmax,
    widen: widen::avx2::widen,
};

impl Isa {
    /// Every instruction set there are kernels for, the plainest first.
    pub const ALL: [Self; 2] = [Self::Scalar, Self::Avx2];

    /// The best that this CPU has.
    pub fn detect() -> Self {
        if Self::Avx2.is_available() { Self::Avx2 } else { Self::Scalar }
    }

    /// What [`ISA_VARIABLE`] asks for, or else the best that this CPU has. A name that is unknown or not available is an error.
    pub fn from_environment() -> Result<Self, UnknownIsa> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) => name.parse(),
            Err(_) => Ok(Self::detect()),
        }
    }

    /// Whether this CPU can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
        }
    }

    /// Its name in [`ISA_VARIABLE`], in logs and in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
        }
    }

    /// Its functions; `None` where the CPU lacks it.
    pub(crate) fn kernels(self) -> Option<&'static Kernels> {
        match self {
            Self::Scalar => Some(&SCALAR),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => self.is_available().then_some(&AVX2),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => None,
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name of an instruction set that does not exist or that this CPU lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownIsa(String);

impl fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let available: Vec<_> = Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Isa::name).collect();
        write!(f, "{ISA_VARIABLE}: no instruction set {:?} on this machine (available: {})", self.0, available.join(", "))
    }
}

impl std::error::Error for UnknownIsa {}

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(name: &str) -> Result<Self, UnknownIsa> {
        Self::ALL.into_iter().find(|isa| isa.name() == name && isa.is_available()).ok_or_else(|| UnknownIsa(name.to_owned()))
    }
}
