//! The mathematics of flows against equations that can be solved by hand.

#![allow(clippy::unwrap_used)]

use domain::Solver;
use sched::solver::{Integrator, guide, noise};

const SOLVERS: [Solver; 3] = [Solver::Euler, Solver::Heun, Solver::Midpoint];

/// Follows `dz/dt = velocity(z, t)` from `z0` at 0 to 1.
fn solve(solver: Solver, steps: u32, z0: f32, velocity: impl Fn(f64, f64) -> f64) -> f32 {
    let mut flow = Integrator::new(solver, steps, 0, vec![z0]);
    while !flow.is_over() {
        let (z, time) = flow.point();
        let v = velocity(f64::from(z[0]), f64::from(time) / 1000.0) as f32;
        flow.advance(vec![v]);
    }
    flow.z()[0]
}

/// `dz/dt = t - 2 z` has the solution `t / 2 - 1 / 4 + (z0 + 1 / 4) exp(-2 t)`.
#[test]
fn the_error_falls_with_the_order_of_the_method() {
    let exact = 0.25 + 1.25 * (-2.0f64).exp();
    let error = |solver, steps| (f64::from(solve(solver, steps, 1.0, |z, t| t - 2.0 * z)) - exact).abs();
    for (solver, order) in [(Solver::Euler, 1), (Solver::Heun, 2), (Solver::Midpoint, 2)] {
        let ratio = error(solver, 20) / error(solver, 40);
        let expected = f64::from(1 << order);
        assert!((ratio - expected).abs() < 0.12 * expected, "{solver:?}: halving the step makes the error {ratio} times smaller");
    }
    assert!(error(Solver::Heun, 40) < error(Solver::Euler, 40) / 20.0);
}

#[test]
fn a_constant_velocity_is_followed_exactly_in_any_number_of_steps() {
    for solver in SOLVERS {
        for steps in [1, 2, 7, 1000] {
            let end = solve(solver, steps, -1.0, |_, _| 3.0);
            assert!((end - 2.0).abs() < 1e-4, "{solver:?} in {steps} steps: {end}");
        }
    }
}

#[test]
fn velocities_are_wanted_at_these_times() {
    let times = |solver| {
        let mut flow = Integrator::new(solver, 4, 0, vec![0.0]);
        let mut times = Vec::new();
        while !flow.is_over() {
            times.push(flow.point().1);
            flow.advance(vec![0.0]);
        }
        times
    };
    assert_eq!(times(Solver::Euler), [0.0, 250.0, 500.0, 750.0]);
    assert_eq!(times(Solver::Heun), [0.0, 250.0, 250.0, 500.0, 500.0, 750.0, 750.0, 1000.0]);
    assert_eq!(times(Solver::Midpoint), [0.0, 125.0, 250.0, 375.0, 500.0, 625.0, 750.0, 875.0]);
}

#[test]
fn a_flow_goes_on_from_its_state_as_if_it_had_never_stopped() {
    let velocity = |z: &[f32], time: f32| z.iter().map(|z| (z * 1.7).sin() - time / 900.0).collect::<Vec<_>>();
    for solver in SOLVERS {
        let mut states = vec![vec![0.3, -1.1]];
        let mut flow = Integrator::new(solver, 9, 0, states[0].clone());
        while !flow.is_over() {
            let (z, time) = flow.point();
            if flow.advance(velocity(&z, time)).is_some() {
                states.push(flow.z().to_vec());
            }
        }
        for done in 0..=9u32 {
            let mut flow = Integrator::new(solver, 9, done, states[done as usize].clone());
            while !flow.is_over() {
                let (z, time) = flow.point();
                flow.advance(velocity(&z, time));
            }
            assert_eq!(flow.z(), states[9], "{solver:?} from step {done}");
        }
    }
}

/// Where the velocity does not change, every estimate is the end.
#[test]
fn estimates_lead_to_the_end() {
    let mut flow = Integrator::new(Solver::Euler, 5, 0, vec![1.0, 2.0]);
    while !flow.is_over() {
        let velocity = flow.advance(vec![2.0, -4.0]).unwrap();
        let estimate = flow.estimate(&velocity);
        assert!((estimate[0] - 3.0).abs() < 1e-5 && (estimate[1] + 2.0).abs() < 1e-5, "{estimate:?}");
    }
    assert_eq!(flow.estimate(&[1e9, 1e9]), flow.z(), "at the end nothing is left to go");
}

#[test]
fn guidance_goes_beyond_the_conditional_velocity() {
    for (guidance, expected) in [(0.0, [1.0, 2.0]), (1.0, [3.0, 2.5]), (2.0, [5.0, 3.0]), (5.0, [11.0, 4.5])] {
        let mut velocity = [3.0, 2.5];
        guide(&mut velocity, &[1.0, 2.0], guidance);
        assert_eq!(velocity, expected, "guidance {guidance}");
    }
}

#[test]
fn noise_is_normal_and_the_seed_decides_it() {
    let values = noise(1, 100_001);
    assert_eq!(values.len(), 100_001);
    let moment = |power| values.iter().map(|&z| f64::from(z).powi(power)).sum::<f64>() / values.len() as f64;
    for (power, expected, tolerance) in [(1, 0.0, 0.015), (2, 1.0, 0.02), (3, 0.0, 0.05), (4, 3.0, 0.15)] {
        assert!((moment(power) - expected).abs() < tolerance, "moment {power}: {}", moment(power));
    }
    // Neighbours have nothing to do with each other.
    let products = values.windows(2).map(|pair| f64::from(pair[0] * pair[1])).sum::<f64>() / values.len() as f64;
    assert!(products.abs() < 0.015, "{products}");
    assert_eq!(noise(1, 7), values[..7], "a longer map begins like a shorter one");
    assert_ne!(noise(2, 7), values[..7]);
    assert!(noise(u64::MAX, 50).iter().all(|value| value.is_finite()));
}

/// A picture must be the same on every machine and in every later version. The values were worked out from the definition of the generator.
#[test]
fn noise_stays_what_it_is() {
    assert_eq!(noise(7, 5), [-1.660_861_2, 0.360_986_5, -0.033_841_487, 0.101_173_64, -0.511_738_8]);
}
