#!/usr/bin/env bash
# Starts Janua as it runs in production, on this machine: nats-server, redis-server and the five services as separate processes.
# Usage: deploy/up.sh MODEL_FOLDER [NAME]      then deploy/down.sh
# Variables: LISTEN (default 127.0.0.1:50051), NATS_PORT (14222), REDIS_PORT (16379), WIRE (nats or direct), REPLICAS of language (1),
# SHARDS of a model with experts (0: none, the language service computes them), SHARD_REPLICAS of each (1), JANUA (a program that is built already; otherwise target/release/janua is built).
# Everything it writes is in target/run: pid files, logs, janua.toml, and what NATS stores.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: deploy/up.sh MODEL_FOLDER [NAME]}
name=${2:-$(basename "$(realpath "$folder")")}
listen=${LISTEN:-127.0.0.1:50051}
nats_port=${NATS_PORT:-14222}
redis_port=${REDIS_PORT:-16379}
wire=${WIRE:-nats}
replicas=${REPLICAS:-1}
shards=${SHARDS:-0}
shard_replicas=${SHARD_REPLICAS:-1}
janua=${JANUA:-target/release/janua}
run=target/run
ready_limit=180 # seconds

say() { printf 'up: %s\n' "$*"; }
die() {
    printf 'up: %s\n' "$*" >&2
    exit 1
}

# running PID: a process that has ended but was not yet collected by its parent does not count.
running() { grep -qE '^State:[[:space:]]+[^ZX[:space:]]' "/proc/$1/status" 2> /dev/null; }

# start NAME COMMAND...: in the background, in a session of its own, with a log and a pid file.
start() {
    local label=$1
    shift
    setsid nohup "$@" > "$run/$label.log" 2>&1 < /dev/null &
    echo $! > "$run/$label.pid"
}

# Shows what a process said last, and stops everything again.
give_up() {
    printf 'up: %s\n' "$1" >&2
    tail -n 5 "$run/$2.log" >&2 || true
    deploy/down.sh > /dev/null
    exit 1
}

# wait_for WHAT LABEL COMMAND...: until the command succeeds, the process ends, or the limit passes.
wait_for() {
    local what=$1 label=$2
    shift 2
    for ((tenths = 0; tenths < ready_limit * 10; tenths++)); do
        if "$@" > /dev/null 2>&1; then return 0; fi
        if ! running "$(cat "$run/$label.pid")"; then give_up "$what has ended, see $run/$label.log" "$label"; fi
        sleep 0.1
    done
    give_up "$what is not ready after $ready_limit s, see $run/$label.log" "$label"
}

listening() { (: < "/dev/tcp/127.0.0.1/$1"); }
all_ready() {
    "$janua" models --server "http://$listen" --json | grep -q '"ready":true'
}

[ -f "$folder/config.json" ] || die "$folder is no model folder (no config.json); give one with make up MODEL=DIR"
mkdir -p "$run"
for file in "$run"/*.pid; do
    [ -e "$file" ] || continue
    if running "$(cat "$file")"; then die "$(basename "$file" .pid) is still running; make down stops it"; fi
done
for port in "$nats_port" "$redis_port" "${listen##*:}"; do
    if listening "$port" 2> /dev/null; then die "port $port is taken; choose others with NATS_PORT, REDIS_PORT and LISTEN"; fi
done

if [ -z "${JANUA:-}" ]; then
    say "building"
    cargo build --release --package janua
fi

cat > "$run/janua.toml" << TOML
[mesh]
wire = "$wire"
nats_url = "nats://127.0.0.1:$nats_port"

[cache]
redis_url = "redis://127.0.0.1:$redis_port"

[router]
listen = "$listen"

[language]
experts = "$([ "$shards" -gt 0 ] && echo remote || echo local)"

[experts]
shards = $shards

[[models]]
name = "$name"
path = "$(realpath "$folder")"
TOML

start nats nats-server --addr 127.0.0.1 --port "$nats_port" --jetstream --store_dir "$run/nats"
start redis redis-server --bind 127.0.0.1 --port "$redis_port" --save '' --appendonly no --dir "$run"
wait_for nats-server nats listening "$nats_port"
wait_for redis-server redis listening "$redis_port"

serve() {
    local label=$1 service=$2
    shift 2
    start "$label" "$janua" serve --service "$service" --config "$run/janua.toml" --quiet "$@"
}
for ((shard = 0; shard < shards; shard++)); do
    for ((i = 1; i <= shard_replicas; i++)); do serve "experts-$shard-$i" experts --set "experts.shard=$shard"; done
done
for ((i = 1; i <= replicas; i++)); do serve "language-$i" language; done
serve tokenizer tokenizer
# A text model has no pictures to read or draw.
if grep -q vision_config "$folder/config.json"; then serve vision vision; fi
if grep -Eq 'vq_config|gen_vision_config' "$folder/config.json"; then serve images images; fi
serve router router
wait_for router router all_ready

say "ready: $name over $wire"
"$janua" models --server "http://$listen"
cat << TEXT
  gRPC   http://$listen      $janua chat --server http://$listen "Why is the sky blue?"
  NATS   nats://127.0.0.1:$nats_port   nats micro ls --server 127.0.0.1:$nats_port
  Redis  redis://127.0.0.1:$redis_port
  logs   $run/*.log
make down stops everything.
TEXT
