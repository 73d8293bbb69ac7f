//! Regenerates `src/gen` from `proto/onnx.proto`. Fails when what is committed is stale; with JANUA_BLESS=1 it is written.

use std::{fs, path::Path};

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(["onnx.proto"], [root.join("proto")]).expect("the proto file compiles");
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gen");
    fs::create_dir_all(&scratch).expect("the scratch folder can be made");
    // The comments of the file are no Rust documentation: indented text in them would be taken for examples.
    prost_build::Config::new().disable_comments(["."]).out_dir(&scratch).compile_fds(descriptors).expect("code can be generated");

    let fresh = fs::read(scratch.join("onnx.rs")).expect("the generated file is there");
    let committed = root.join("src/gen/onnx.rs");
    if std::env::var_os("JANUA_BLESS").is_some() {
        fs::write(&committed, &fresh).expect("the generated file can be written");
        return;
    }
    assert!(fs::read(&committed).unwrap_or_default() == fresh, "{} is stale: run this test with JANUA_BLESS=1", committed.display());
}
