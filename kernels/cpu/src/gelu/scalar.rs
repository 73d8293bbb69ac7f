//! Reference, in f64.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

pub(crate) fn gelu(x: &mut [f32]) {
    for x in x {
        let v = f64::from(*x);
        *x = (0.5 * v * (1.0 + erf(v * FRAC_1_SQRT_2))) as f32;
    }
}

/// The error function to about 1e-12: the series of positive terms near zero, one minus the continued fraction further out.
fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = match z {
        z if z < 3.0 => {
            // erf z = 2/sqrt(pi) e^(-z²) sum of 2^n z^(2n+1) / (1·3·5···(2n+1))
            let mut term = z;
            let mut sum = z;
            for n in 1..80 {
                term *= 2.0 * z * z / f64::from(2 * n + 1);
                sum += term;
            }
            2.0 / PI.sqrt() * (-z * z).exp() * sum
        }
        z if z < 7.0 => {
            // erfc z = e^(-z²) / sqrt(pi) / (z + (1/2) / (z + 1 / (z + (3/2) / (z + ...))))
            let fraction = (1..60).rev().fold(z, |tail, n| z + 0.5 * f64::from(n) / tail);
            1.0 - (-z * z).exp() / PI.sqrt() / fraction
        }
        z if z.is_nan() => z,
        _ => 1.0,
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn agrees_with_tabulated_values() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_0),
            (0.5, 0.520_499_877_8),
            (1.0, 0.842_700_792_9),
            (1.5, 0.966_105_146_5),
            (2.0, 0.995_322_265_0),
        ] {
            assert!((erf(x) - expected).abs() < 1e-10, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert!((erf(2.999_999) - erf(3.0)).abs() < 1e-9, "the two formulas meet");
    }
}
