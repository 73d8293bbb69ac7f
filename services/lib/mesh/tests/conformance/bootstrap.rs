//! Regenerates `gen` from `probe.proto`. Fails when what is committed is stale; `make proto` (JANUA_BLESS=1) writes it.

use std::{fs, path::Path};

use protox::prost::Message as _;

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let descriptors = protox::compile(["probe.proto"], [&root]).expect("the proto file compiles");

    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("probe");
    fs::create_dir_all(&scratch).expect("the scratch folder can be made");
    tonic_prost_build::configure()
        .bytes(".probe.v1")
        .out_dir(&scratch)
        .compile_fds(descriptors.clone())
        .expect("code can be generated");

    let code = fs::read_to_string(scratch.join("probe.v1.rs")).expect("the generated file is there");
    check(&root.join("gen/probe.v1.rs"), code.as_bytes());
    check(&root.join("gen/descriptor.bin"), &descriptors.encode_to_vec());
}

fn check(path: &Path, fresh: &[u8]) {
    if std::env::var_os("JANUA_BLESS").is_some() {
        fs::write(path, fresh).expect("the generated file can be written");
        return;
    }
    let stored = fs::read(path).unwrap_or_default();
    assert!(stored == fresh, "{} is stale: run `make proto`", path.display());
}
