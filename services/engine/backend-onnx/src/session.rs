use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::Mutex;

use checkpoint::SharedTensor;
use layers::EngineError;
use ort::AsPointer;
use ort::session::builder::SessionBuilder;
use ort::session::{RunOptions, Session as OrtSession, SessionInputValue};
use ort::value::TensorRef;

use crate::graph::{Graph, Model};
use crate::runtime::environment;

/// The runtime's setting for where the files lie that a model in memory names.
const FOLDER_KEY: &str = "session.model_external_initializers_file_folder_path";

/// The runtime's settings for every session, by its own keys.
///
/// Weights are packed for the matrix kernel when a graph is loaded, as the runtime does by itself. Without, the tower of SigLIP-L takes
/// 4.0 instead of 2.8 seconds of processor time for a picture. The memory is the same within 2 % (a packed weight takes the place of the
/// other), and loading takes longer by as much as one picture: 2.5 s instead of 0.9 s.
pub const SETTINGS: [(&str, &str); 1] = [
    // Threads that wait by spinning would take the cores from the language model.
    ("session.intra_op.allow_spinning", "0"),
];

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
    folder: Option<String>,
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
    /// Compiles `graph`. The runtime maps the weights where they lie and copies only those that it has to widen to f32, or all of
    /// them when they lie in several folders.
    pub fn new(graph: Graph, options: &SessionOptions) -> Result<Self, EngineError> {
        let Model { bytes, folder, in_memory, weights } = graph.finish();
        let mut builder = builder(options, folder.as_deref()).map_err(|error| failed("a session cannot be set up", &error))?;
        hand_over(&mut builder, &in_memory).map_err(|error| failed("weights cannot be handed over", &error))?;
        let session = builder.commit_from_memory(&bytes).map_err(|error| failed("a graph cannot be loaded", &error))?;
        // The runtime reads maps or copies of its own: ours would only be resident beside them.
        weights.iter().for_each(SharedTensor::release);
        give_back_holes();
        Ok(Self { session: Mutex::new(session), weights, model: bytes, folder })
    }

    /// A digest of everything that decides the outputs: the graph and all weights, each read once.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.model);
        for weight in &self.weights {
            hasher.update(weight.bytes());
            weight.release();
        }
        hasher.finalize().to_hex().to_string()
    }

    /// The graph as an ONNX file for other programs, and the folder that it belongs in, beside the weights that it names. `None` where they
    /// lie in several folders.
    pub fn onnx(&self) -> Option<(&[u8], &Path)> {
        self.folder.as_ref().map(|folder| (&self.model[..], Path::new(folder)))
    }

    /// Computes every output of the graph from `inputs`, which come in the order in which the graph declares them.
    pub fn run(&self, inputs: &[Input<'_>]) -> Result<Vec<Output>, EngineError> {
        let inputs: Vec<SessionInputValue<'_>> =
            inputs.iter().map(tensor).collect::<Result<_, _>>().map_err(|error| failed("bad input", &error))?;
        // A panic during an earlier run leaves nothing half done in here.
        let mut session = self.session.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let options = run_options().map_err(|error| failed("a run cannot be set up", &error))?;
        let outputs = session.run_with_options(&inputs[..], &options).map_err(|error| failed("a graph cannot be run", &error))?;
        let mut results = Vec::with_capacity(outputs.len());
        for (name, value) in &outputs {
            let (shape, values) = value.try_extract_tensor::<f32>().map_err(|error| failed("bad output", &error))?;
            let shape = shape.iter().map(|&size| size as usize).collect();
            results.push(Output { name: name.to_owned(), shape, values: values.to_vec() });
        }
        Ok(results)
    }
}

fn builder(options: &SessionOptions, folder: Option<&str>) -> Result<SessionBuilder, Box<dyn std::error::Error>> {
    let mut builder = OrtSession::builder(environment()?)?
        .with_intra_threads(options.threads)?
        // A plan of all activations made ahead leaves 100 MB of a large tower twice in memory, and saves no time in runs of a second.
        .with_memory_pattern(false)?;
    for (key, value) in SETTINGS {
        builder = builder.with_config_entry(key, value)?;
    }
    if let Some(folder) = folder {
        builder = builder.with_config_entry(FOLDER_KEY, folder)?;
    }
    Ok(builder)
}

/// Settings of every run, by the runtime's own keys.
pub const RUN_SETTINGS: [(&str, &str); 1] = [
    // A decoder's activations take 400 MB, for two seconds of the minutes that a picture takes. Taking them anew costs nothing measurable.
    ("memory.enable_memory_arena_shrinkage", "cpu:0"),
];

fn run_options() -> Result<RunOptions, ort::Error> {
    let mut options = RunOptions::new()?;
    RUN_SETTINGS.iter().try_for_each(|(key, value)| options.set(key, value))?;
    Ok(options)
}

/// Has the C library give memory back that it holds between blocks in use. Widening and packing the weights of a graph one after the other
/// leaves 100 MB (SigLIP-L) to 200 MB (VQ-16) of such holes.
fn give_back_holes() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
    // SAFETY: the function takes no pointer, locks what it works on, and touches only memory that nobody has been given.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives the runtime the bytes of weights that it cannot map. It copies them while it loads the graph.
fn hand_over(builder: &mut SessionBuilder, weights: &[(String, SharedTensor)]) -> Result<(), Box<dyn std::error::Error>> {
    if weights.is_empty() {
        return Ok(());
    }
    let names: Vec<CString> = weights.iter().map(|(name, _)| CString::new(name.as_str())).collect::<Result<_, _>>()?;
    let names: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let buffers: Vec<*mut c_char> = weights.iter().map(|(_, weight)| weight.bytes().as_ptr().cast_mut().cast()).collect();
    let lengths: Vec<usize> = weights.iter().map(|(_, weight)| weight.bytes().len()).collect();
    #[allow(unsafe_code)]
    // SAFETY: the three arrays have the length that is passed; the names end in zero, and the runtime copies them. It only reads the
    // buffers, so that they may be maps of read-only files. `Session` keeps the maps (`SharedTensor`) until the runtime's session is
    // gone; when loading fails, our caller drops them after the builder.
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
