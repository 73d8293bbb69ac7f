#!/usr/bin/env bash
# Our ONNX graphs beside PyTorch's exports, on the release of ONNX Runtime that the services load. PyTorch comes from its Python wheel,
# which cannot be imported without the CUDA libraries that it was built with: 4 GB in a virtual environment under target/tools.
# Usage: tests/benches/exported.sh [flags of exported.py]; first `janua bench families --families janus,janusflow --keep`.
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=target/tools/exported
runtime=$(sed -n 's/^onnxruntime==\([0-9.]*\).*/\1/p' deploy/deps/onnxruntime.txt)
packages=("onnxruntime==$runtime" torch==2.15.0 onnx==1.23.2 onnxscript==0.7.2 safetensors==0.8.0 numpy==2.4.6)
if [ "$(cat "$environment/packages" 2> /dev/null)" != "${packages[*]}" ]; then
    printf 'exported: installing %s under %s\n' "${packages[*]}" "$environment" >&2
    rm -rf "$environment"
    python3 -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}"
    printf '%s' "${packages[*]}" > "$environment/packages"
fi
exec "$environment/bin/python" -W ignore tests/benches/exported.py "$@"
