use std::ffi::{CString, c_char};
use std::sync::Mutex;

use checkpoint::SharedTensor;
use layers::EngineError;
use ort::AsPointer;
use ort::session::builder::SessionBuilder;
use ort::session::{Session as OrtSession, SessionInputValue};
use ort::value::TensorRef;

use crate::graph::{Graph, Model, file_name};
use crate::runtime::environment;

/// How a graph is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// Threads that share the work of one run; 0 = one for each core.
    pub threads: usize,
}

/// A graph that is ready to run. Runs are one after the other: each already uses all threads of the session.
#[derive(Debug)]
pub struct Session {
    // Fields are dropped in this order: the runtime must be gone before the bytes that it points to.
    session: Mutex<OrtSession>,
    weights: Vec<SharedTensor>,
    model: Vec<u8>,
}

/// A tensor that goes in, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    Floats { shape: &'a [usize], values: &'a [f32] },
    Ids { shape: &'a [usize], values: &'a [i64] },
}

/// A tensor that comes out, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Session {
    /// Compiles `graph`. Weights stay where they are: the runtime reads them from the mapped file, except those it has to widen to f32.
    pub fn new(graph: Graph, options: &SessionOptions) -> Result<Self, EngineError> {
        let Model { bytes, weights } = graph.finish();
        let mut builder = builder(options).map_err(|error| failed("a session cannot be set up", &error))?;
        share_weights(&mut builder, &weights).map_err(|error| failed("weights cannot be handed over", &error))?;
        let session = builder.commit_from_memory(&bytes).map_err(|error| failed("a graph cannot be loaded", &error))?;
        Ok(Self { session: Mutex::new(session), weights, model: bytes })
    }

    /// A digest of everything that decides the outputs: the graph and all weights, each read once.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.model);
        for weight in &self.weights {
            hasher.update(weight.bytes());
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Computes every output of the graph from `inputs`, which come in the order in which the graph declares them.
    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<Output>, EngineError> {
        let inputs: Vec<SessionInputValue<'_>> =
            inputs.iter().map(tensor).collect::<Result<_, _>>().map_err(|error| failed("bad input", &error))?;
        // A panic during an earlier run leaves nothing half done in here.
        let mut session = self.session.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let outputs = session.run(&inputs[..]).map_err(|error| failed("a graph cannot be run", &error))?;
        let mut results = Vec::with_capacity(outputs.len());
        for (name, value) in &outputs {
            let (shape, values) = value.try_extract_tensor::<f32>().map_err(|error| failed("bad output", &error))?;
            let shape = shape.iter().map(|&size| size as usize).collect();
            results.push(Output { name: name.to_owned(), shape, values: values.to_vec() });
        }
        Ok(results)
    }
}

fn builder(options: &SessionOptions) -> Result<SessionBuilder, Box<dyn std::error::Error>> {
    let builder = OrtSession::builder(environment()?)?
        .with_intra_threads(options.threads)?
        // Threads that wait by spinning would take the cores from the language model.
        .with_intra_op_spinning(false)?
        // Packing copies every weight to save nothing measurable; without it a large tower loads at once and stays in the page cache.
        .with_prepacking(false)?;
    Ok(builder)
}

/// Tells the runtime where in memory the bytes of each weight are. It keeps the addresses for as long as the session lives.
fn share_weights(builder: &mut SessionBuilder, weights: &[SharedTensor]) -> Result<(), Box<dyn std::error::Error>> {
    let names: Vec<CString> = (0..weights.len()).map(|index| CString::new(file_name(index))).collect::<Result<_, _>>()?;
    let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let buffers: Vec<*mut c_char> = weights.iter().map(|weight| weight.bytes().as_ptr().cast_mut().cast()).collect();
    let lengths: Vec<usize> = weights.iter().map(|weight| weight.bytes().len()).collect();
    #[allow(unsafe_code)]
    // SAFETY: the three arrays have the length that is passed; the names end in zero, and the runtime copies them. The buffers are
    // mapped read-only and the runtime only reads initializers; `Session` keeps the maps (`SharedTensor`) until the runtime's session
    // is gone, on every path: they are dropped after it, or, when loading fails, after the builder of our caller.
    unsafe {
        let add = ort::api().AddExternalInitializersFromMemory;
        let status = add(builder.ptr_mut(), names.as_ptr(), buffers.as_ptr(), lengths.as_ptr(), weights.len());
        ort::Error::result_from_status(status)?;
    }
    Ok(())
}

fn tensor<'a>(input: &Input<'a>) -> Result<SessionInputValue<'a>, ort::Error> {
    Ok(match *input {
        Input::Floats { shape, values } => TensorRef::from_array_view((shape, values))?.into(),
        Input::Ids { shape, values } => TensorRef::from_array_view((shape, values))?.into(),
    })
}

/// The runtime's message on one line, without the source locations that it likes to add.
fn failed(what: &str, error: &dyn std::fmt::Display) -> EngineError {
    let reason = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    EngineError::Compute(format!("{what}: {}", reason.trim_start_matches("compute: ")))
}
