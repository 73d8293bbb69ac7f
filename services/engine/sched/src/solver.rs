//! The mathematics of a flow: pure functions (spec: janusflow.md section 2).
//!
//! A flow takes noise at time 0 to a picture at time 1 along `dz/dt = v(z, t)`. Step `k` of `n` goes from `k / n` to `(k + 1) / n`; the
//! network is told 1000 times the time. All in f32, element by element, so that nothing but the job decides the result.

use std::borrow::Cow;
use std::f64::consts::TAU;

use domain::{FlowState, Solver};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

/// Network time at the end of a flow.
const END: f64 = 1000.0;

/// `count` values of normal distribution, decided by `seed` alone.
///
/// ChaCha with 8 rounds keyed by the seed gives numbers in [0, 1); each two of them, `a` and `b`, give two values:
/// `sqrt(-2 ln(1 - a))` times the cosine and the sine of `2 pi b` (Box and Muller), computed in f64 and rounded once.
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    let mut uniform = || (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut values = Vec::with_capacity(count + 1);
    while values.len() < count {
        let (radius, angle) = ((-2.0 * (1.0 - uniform()).ln()).sqrt(), TAU * uniform());
        values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    values.truncate(count);
    values
}

/// Guided velocity: `w * conditional - (w - 1) * unconditional`. Becomes `conditional`.
pub fn guide(conditional: &mut [f32], unconditional: &[f32], guidance: f32) {
    for (c, &u) in conditional.iter_mut().zip(unconditional) {
        *c = guidance * *c - (guidance - 1.0) * u;
    }
}

/// A flow on its way. Asks for velocities one at a time: one a step, or two for a method of second order.
#[derive(Debug, Clone)]
pub struct Integrator {
    solver: Solver,
    steps: u32,
    done: u32,
    z: Vec<f32>,
    /// The velocity at the beginning of the step, while another one is wanted.
    first: Option<Vec<f32>>,
}

impl Integrator {
    /// A flow of `steps` steps (at least one), `done` of which have led to `z`.
    pub fn new(solver: Solver, steps: u32, done: u32, z: Vec<f32>) -> Self {
        Self { solver, steps, done, z, first: None }
    }

    /// Steps taken.
    pub fn done(&self) -> u32 {
        self.done
    }

    /// Steps in all.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// The map after them.
    pub fn z(&self) -> &[f32] {
        &self.z
    }

    /// Whether the flow is at its end.
    pub fn is_over(&self) -> bool {
        self.done >= self.steps
    }

    /// Where the next velocity is wanted: a map and a network time in 0..=1000.
    pub fn point(&self) -> (Cow<'_, [f32]>, f32) {
        let (k, n) = (f64::from(self.done), f64::from(self.steps));
        match (&self.first, self.solver) {
            (None, _) | (Some(_), Solver::Euler) => (Cow::Borrowed(&self.z), (END * k / n) as f32),
            (Some(first), Solver::Heun) => (Cow::Owned(along(&self.z, first, self.dt())), (END * (k + 1.0) / n) as f32),
            (Some(first), Solver::Midpoint) => (Cow::Owned(along(&self.z, first, 0.5 * self.dt())), (END * (k + 0.5) / n) as f32),
        }
    }

    /// Takes the velocity at [`Integrator::point`]. When that completes a step: the velocity along which the step went.
    pub fn advance(&mut self, velocity: Vec<f32>) -> Option<Vec<f32>> {
        let velocity = match (self.solver, self.first.take()) {
            (Solver::Euler, _) => velocity,
            (Solver::Heun | Solver::Midpoint, None) => {
                self.first = Some(velocity);
                return None;
            }
            (Solver::Heun, Some(first)) => first.iter().zip(&velocity).map(|(a, b)| 0.5 * (a + b)).collect(),
            (Solver::Midpoint, Some(_)) => velocity,
        };
        self.z = along(&self.z, &velocity, self.dt());
        self.done += 1;
        Some(velocity)
    }

    /// The finished map if the velocity stayed as it is: `z + (1 - t) * v`.
    pub fn estimate(&self, velocity: &[f32]) -> Vec<f32> {
        let left = f64::from(self.steps - self.done) / f64::from(self.steps);
        along(&self.z, velocity, left as f32)
    }

    /// Forget the velocities of a step that is not complete: it begins again.
    pub fn rewind(&mut self) {
        self.first = None;
    }

    fn dt(&self) -> f32 {
        (1.0 / f64::from(self.steps)) as f32
    }
}

/// `z + factor * velocity`
fn along(z: &[f32], velocity: &[f32], factor: f32) -> Vec<f32> {
    z.iter().zip(velocity).map(|(z, v)| z + factor * v).collect()
}

/// Steps and map of a flow that goes on from `from`, or begins with the noise of `seed`.
pub fn start(from: Option<FlowState>, seed: u64, count: usize) -> (u32, Vec<f32>) {
    match from {
        Some(state) => (state.done, state.z.values.to_vec()),
        None => (0, noise(seed, count)),
    }
}
