//! Regenerates `src/gen` from `janua/v1/*.proto`. Fails when what is committed is stale; `make proto` (JANUA_BLESS=1) writes it.

use std::{fs, path::Path};

use protox::prost::Message;

const FILES: [&str; 7] = [
    "janua/v1/common.proto",
    "janua/v1/janua.proto",
    "janua/v1/tokenizer.proto",
    "janua/v1/vision.proto",
    "janua/v1/language.proto",
    "janua/v1/experts.proto",
    "janua/v1/images.proto",
];

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(FILES, [root]).expect("the proto files compile");

    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("gen");
    fs::create_dir_all(&scratch).expect("the scratch folder can be made");
    tonic_prost_build::configure().bytes(".janua.v1").out_dir(&scratch).compile_fds(descriptors.clone()).expect("code can be generated");

    let code = fs::read_to_string(scratch.join("janua.v1.rs")).expect("the generated file is there");
    let committed = root.join("src/gen");
    check(&committed.join("janua.v1.rs"), code.as_bytes());
    check(&committed.join("descriptor.bin"), &descriptors.encode_to_vec());
}

fn check(path: &Path, fresh: &[u8]) {
    if std::env::var_os("JANUA_BLESS").is_some() {
        fs::write(path, fresh).expect("the generated file can be written");
        return;
    }
    let stored = fs::read(path).unwrap_or_default();
    assert!(stored == fresh, "{} is stale: run `make proto`", path.display());
}
