# Janua's front door. `make help` lists what it does.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

MODEL ?= tests/fixtures/janus
ARGS ?=
export PATH := $(CURDIR)/target/tools/py/bin:$(PATH)

.PHONY: help deps run serve test unit check fmt clippy deny docs shell faults bench proto up down clean

help: ## List the targets.
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

deps: ## Install nats-server, redis-server and ONNX Runtime if they are missing.
	@deploy/deps/install.sh

run: deps ## Build, start everything in one process, send three requests, keep serving (ARGS=--once exits, MODEL=DIR serves another folder).
	@cargo build --release --package janua
	@target/release/janua demo --model $(MODEL) $(ARGS)

test: deps check unit ## Everything that CI runs.

unit: deps ## The tests of all crates, with real nats-server, redis-server and ONNX Runtime.
	cargo test --workspace

check: fmt clippy deny docs shell ## The checks that need no test run.

fmt: ## Formatting.
	cargo fmt --all --check

clippy: ## Lints; a warning fails.
	cargo clippy --workspace --all-targets -- -D warnings

deny: ## Licences, bans and sources of all dependencies.
	@deploy/deps/lint.sh
	cargo-deny check licenses bans sources

docs: ## Documentation builds without a warning.
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

shell: ## Shell scripts.
	@deploy/deps/lint.sh
	shellcheck $$(git ls-files '*.sh' .ci/run)

faults: deps ## Kill replicas for a minute under load, and measure shards behind a link with delay and loss (six minutes; root for the links).
	JANUA_FAULT_SECONDS=60 cargo test --workspace --test faults -- --nocapture --test-threads 1

bench: deps ## Measure, as ratios against peers and limits in the same run (half an hour; 15 GB of disk).
	cargo bench --workspace
	@cargo build --release --package janua
	@target/release/janua bench families --families llama,v2-lite,moe,vl-hybrid
	@target/release/janua bench families --families janus,janusflow --keep
	@tests/benches/exported.sh
	@target/release/janua bench families --families moe --keep --no-measure
	@target/release/janua bench shards target/bench/moe --shards 2 --batch 16

proto: ## Generate the wire types anew.
	JANUA_BLESS=1 cargo test --package proto

up: deps ## Start the services as separate processes over nats-server and redis-server.
	@deploy/up.sh $(MODEL)

down: ## Stop what `make up` started.
	@deploy/down.sh

clean: ## Remove everything that was built or fetched.
	cargo clean
