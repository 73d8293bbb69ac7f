//! What an operator reads when the shared library is missing. In a process of its own: the library is looked for once.
#![allow(clippy::unwrap_used)]

use std::process::Command;

const CHILD: &str = "a_missing_library_is_explained";

#[test]
fn a_missing_library_is_explained() {
    if std::env::var_os("JANUA_TEST_CHILD").is_some() {
        println!("says: {}", backend_onnx::runtime_version().unwrap_err());
        return;
    }
    for (path, expected) in
        [("/nowhere/libonnxruntime.so", "ORT_DYLIB_PATH=/nowhere/libonnxruntime.so"), ("/dev/null", "ORT_DYLIB_PATH=/dev/null")]
    {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", CHILD, "--nocapture"])
            .env("JANUA_TEST_CHILD", "1")
            .env(backend_onnx::LIBRARY_VARIABLE, path)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.contains("says: ")).unwrap_or_else(|| panic!("{text}"));
        assert!(output.status.success(), "{text}");
        assert!(line.contains("ONNX Runtime cannot be loaded") && line.contains(expected) && line.contains("make deps"), "{line}");
    }
}

#[test]
fn the_library_is_found() {
    assert!(backend_onnx::runtime_version().unwrap().contains("Build Info"));
}
