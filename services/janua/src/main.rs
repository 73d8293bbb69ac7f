//! The program `janua`. Everything is in the library, so that tests and benches can use it too.

fn main() -> std::process::ExitCode {
    janua::run()
}
