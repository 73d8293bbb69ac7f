//! Regenerates `conformance/gen` from `conformance/conformance.proto`. Fails when what is committed is stale; with `JANUA_BLESS=1`
//! it writes it anew.

use std::fs;
use std::path::Path;

use protox::prost::Message as _;

#[test]
fn generated_code_is_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
    let descriptors = protox::compile(["conformance.proto"], [&folder]).expect("the proto file compiles");
    let scratch = tempfile::tempdir().expect("a scratch folder can be made");
    let code = tonic_prost_build::configure().bytes(".").out_dir(scratch.path()).compile_fds(descriptors.clone());
    code.expect("code can be generated");
    let code = fs::read(scratch.path().join("conformance.v1.rs")).expect("the generated file is there");
    for (name, fresh) in [("conformance.v1.rs", code), ("descriptor.bin", descriptors.encode_to_vec())] {
        let file = folder.join("gen").join(name);
        if std::env::var_os("JANUA_BLESS").is_some() {
            fs::write(&file, &fresh).expect("the generated file can be written");
            continue;
        }
        assert!(fs::read(&file).unwrap_or_default() == fresh, "{} is stale", file.display());
    }
}
