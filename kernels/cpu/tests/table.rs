//! `kernels/README.md` says which operation has a kernel for which instruction set; this checks it against the folders.

use std::{collections::BTreeSet, fs, path::Path};

const ISAS: [&str; 2] = ["scalar", "avx2"];

#[test]
fn the_table_in_the_readme_is_what_the_folders_hold() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut rows = BTreeSet::new();
    for entry in fs::read_dir(root.join("src")).expect("src/ is there") {
        let path = entry.expect("src/ can be listed").path();
        if path.is_dir() {
            let op = path.file_name().expect("a folder has a name").to_string_lossy().into_owned();
            let cells = ISAS.map(|isa| if path.join(format!("{isa}.rs")).exists() { " yes |" } else { " |" });
            rows.insert(format!("| `{op}` |{}", cells.concat()));
        }
    }
    let readme = fs::read_to_string(root.join("../README.md")).expect("kernels/README.md is there");
    let written: BTreeSet<_> = readme.lines().filter(|line| line.starts_with("| `")).map(with_first_cells).collect();
    assert_eq!(written, rows, "bring the table in kernels/README.md up to date");
}

/// A row without its last cell, which is prose.
fn with_first_cells(line: &str) -> String {
    let cells: Vec<_> = line.split_inclusive('|').collect();
    cells[..2 + ISAS.len()].concat()
}
