#!/usr/bin/env bash
# Installs what Janua needs beside Rust, and nothing twice:
#   nats-server and redis-server (Debian packages), and ONNX Runtime's shared library (from its Python wheel) under target/third_party.
# Usage: deploy/deps/install.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

apt_install() {
    local missing=()
    local program
    for program in nats-server redis-server; do
        command -v "$program" > /dev/null || missing+=("$program")
    done
    command -v cc > /dev/null || missing+=(gcc libc6-dev)
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get > /dev/null || die "please install ${missing[*]} (no apt-get here)"
    local as_root=()
    [ "$(id -u)" = 0 ] || as_root=(sudo)
    say "installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    # The servers are started by hand on their own ports: keep the packages from starting system services.
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
}

unpack_onnxruntime() {
    local library=target/third_party/onnxruntime/libonnxruntime.so
    local stamp=target/third_party/onnxruntime/version
    if [ -f "$library" ] && cmp -s deploy/deps/onnxruntime.txt "$stamp"; then return 0; fi
    python3 -m pip --version > /dev/null 2>&1 || die "python3 with pip is needed to fetch ONNX Runtime"
    local machine wheels
    machine=$(uname -m)
    wheels=$(mktemp -d)
    say "fetching ONNX Runtime for $machine"
    python3 -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary=:all: \
        --python-version 3.11 --implementation cp --abi cp311 --platform "manylinux_2_28_$machine" --platform "manylinux_2_27_$machine" \
        --dest "$wheels" -r deploy/deps/onnxruntime.txt
    mkdir -p "$(dirname "$library")"
    python3 - "$wheels" "$library" << 'PYTHON'
import pathlib, sys, zipfile
wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if "/libonnxruntime.so." in n)
    partial = pathlib.Path(sys.argv[2] + ".partial")
    partial.write_bytes(archive.read(name))
    partial.rename(sys.argv[2])
PYTHON
    rm -rf "$wheels"
    cp deploy/deps/onnxruntime.txt "$stamp"
}

apt_install
unpack_onnxruntime
