//! The generated test service. `JANUA_BLESS=1 cargo test -p mesh generated` writes it anew after a change of the proto file.

#![allow(clippy::all)]

include!("gen/conformance.v1.rs");

pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("gen/descriptor.bin");

#[test]
fn generated_code_is_current() {
    use std::{fs, path::Path};

    use protox::prost::Message as _;

    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let descriptors = protox::compile(["conformance.proto"], [&folder]).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    tonic_prost_build::configure().bytes(".").out_dir(scratch.path()).compile_fds(descriptors.clone()).unwrap();
    let code = fs::read(scratch.path().join("conformance.v1.rs")).unwrap();
    for (name, fresh) in [("conformance.v1.rs", code), ("descriptor.bin", descriptors.encode_to_vec())] {
        let file = folder.join("gen").join(name);
        if std::env::var_os("JANUA_BLESS").is_some() {
            fs::write(&file, &fresh).unwrap();
        }
        assert!(fs::read(&file).unwrap_or_default() == fresh, "{} is stale", file.display());
    }
}
