use std::sync::Arc;

use domain::{Event, FlowState, ImageSampling, Latent, LatentGrid};
use layers::{EngineError, FlowInput, FlowModel, NoObserver};

use crate::solver::{self, Integrator};

/// Conditional and unconditional.
const PAIR: usize = 2;

/// The state of a task that draws by a flow.
#[derive(Debug)]
pub(crate) struct Flow {
    grid: LatentGrid,
    guidance: f32,
    estimate_every: Option<u32>,
    integrator: Integrator,
    /// The map whose velocity the sequences compute; `None` while they do not.
    input: Option<FlowInput>,
    /// Hidden states of both sequences behind the prompt, as far as they have come: `[rows, hidden]`.
    hidden: [Vec<f32>; PAIR],
}

impl Flow {
    /// A flow from noise, or from where an earlier worker has come to.
    pub fn new(grid: LatentGrid, sampling: &ImageSampling, estimate_every: Option<u32>, from: Option<FlowState>) -> Self {
        let (done, z) = solver::start(from, sampling.seed, grid.len());
        let integrator = Integrator::new(sampling.solver, sampling.steps, done, z);
        Self { grid, guidance: sampling.guidance, estimate_every, integrator, input: None, hidden: Default::default() }
    }

    /// Whether there is nothing more to compute.
    pub fn is_over(&self) -> bool {
        self.integrator.is_over()
    }

    /// What was computed of a velocity is gone. The map stays: the velocity is computed again.
    pub fn reset(&mut self) {
        self.input = None;
        self.hidden = Default::default();
    }

    /// Hidden states of the next `rows` rows of a sequence. Fails when there are not as many as that.
    pub fn collect(&mut self, sequence: usize, rows: usize, hidden: &[f32]) -> Result<(), EngineError> {
        let width = self.input.as_ref().map_or(0, |input| input.rows.len()) / self.grid.positions;
        if hidden.len() != rows * width {
            return Err(EngineError::Compute(format!("{} hidden values for {rows} rows of {width}", hidden.len())));
        }
        self.hidden[sequence].extend_from_slice(hidden);
        Ok(())
    }

    /// The rows that the sequences shall compute next behind the prompt, `[positions, hidden]`; `None` while they compute others.
    pub fn next_rows(&mut self, model: &dyn FlowModel) -> Result<Option<Arc<[f32]>>, EngineError> {
        if self.input.is_some() {
            return Ok(None);
        }
        let (z, time) = self.integrator.point();
        let input = model.encode(&z, time, &mut NoObserver)?;
        let rows = input.rows.clone();
        self.input = Some(input);
        Ok(Some(rows))
    }

    /// When both sequences have come to their end: their velocities, and with them a step or a part of one. Returns what there is to tell.
    pub fn advance(&mut self, model: &dyn FlowModel) -> Result<Option<Event>, EngineError> {
        let complete = |input: &FlowInput| self.hidden.iter().all(|hidden| hidden.len() == input.rows.len());
        let Some(input) = self.input.take_if(|input| complete(input)) else { return Ok(None) };
        let time = input.rows.len() / self.grid.positions; // values of the first row, which is no part of the map
        let [conditional, unconditional] = std::mem::take(&mut self.hidden);
        let mut velocity = model.decode(&conditional[time..], &input, &mut NoObserver)?;
        solver::guide(&mut velocity, &model.decode(&unconditional[time..], &input, &mut NoObserver)?, self.guidance);
        let Some(velocity) = self.integrator.advance(velocity) else { return Ok(None) };
        self.step(&velocity).map(Some)
    }

    /// The event of the step that has gone along `velocity`.
    fn step(&self, velocity: &[f32]) -> Result<Event, EngineError> {
        let (done, total, z) = (self.integrator.done(), self.integrator.steps(), self.integrator.z());
        if !z.iter().all(|value| value.is_finite()) {
            return Err(EngineError::Compute(format!("the latent map is not finite after step {done} of {total}")));
        }
        let due = self.estimate_every.is_some_and(|every| done.is_multiple_of(every)) && done < total;
        let estimate = due.then(|| Latent::new(self.grid, self.integrator.estimate(velocity)));
        Ok(Event::Flow { state: FlowState { done, z: Latent::new(self.grid, z) }, total, estimate })
    }
}
