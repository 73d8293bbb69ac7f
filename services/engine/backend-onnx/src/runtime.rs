use std::path::PathBuf;
use std::sync::OnceLock;

use layers::EngineError;
use ort::environment::Environment;
use ort::logging::LogLevel;

/// Environment variable with the path of ONNX Runtime's shared library.
pub const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// The library's name where the variable is not set: the system's loader then looks for it.
const LIBRARY: &str = if cfg!(target_os = "macos") { "libonnxruntime.dylib" } else { "libonnxruntime.so" };

/// Loaded once per process and kept until its end, whatever comes of it.
static ENVIRONMENT: OnceLock<Result<Environment, String>> = OnceLock::new();

/// The runtime, loaded and initialised on the first call.
pub(crate) fn environment() -> Result<&'static Environment, EngineError> {
    ENVIRONMENT.get_or_init(start).as_ref().map_err(|reason| EngineError::Compute(reason.clone()))
}

/// What the loaded library says about itself, for `janua doctor`; an error where it cannot be loaded.
pub fn runtime_version() -> Result<String, EngineError> {
    environment()?;
    Ok(ort::info().to_owned())
}

/// The library where an installation or the build tree has it, seen from the running program: beside it, in `../lib`, or in
/// `target/third_party`. Tests run from one folder deeper than programs.
fn beside_program() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let folder = program.parent()?;
    let places = [".", "../lib", "../third_party/onnxruntime", "../../third_party/onnxruntime"];
    places.iter().map(|place| folder.join(place).join(LIBRARY)).find(|path| path.is_file())
}

fn start() -> Result<Environment, String> {
    let given = std::env::var_os(LIBRARY_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let path = given.clone().or_else(beside_program).unwrap_or_else(|| LIBRARY.into());
    let refuse = |reason: &dyn std::fmt::Display| {
        let found =
            if given.is_some() { format!("{LIBRARY_VARIABLE}={}", path.display()) } else { format!("{LIBRARY_VARIABLE} is not set") };
        let reason = reason.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        format!(
            "ONNX Runtime cannot be loaded ({found}): {reason}; run `make deps` or set {LIBRARY_VARIABLE} to libonnxruntime.so 1.31 or newer"
        )
    };
    let environment = ort::init_from(&path).map_err(|error| refuse(&error))?;
    let environment = environment.with_name("janua").with_telemetry(false).build().map_err(|error| refuse(&error))?;
    environment.set_log_level(LogLevel::Warning);
    Ok(environment)
}
