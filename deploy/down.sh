#!/usr/bin/env bash
# Stops what deploy/up.sh started: the router first, so that requests in flight still find every stage; the brokers last.
set -euo pipefail
cd "$(dirname "$0")/.."

run=target/run
limit=40 # seconds: the services' grace period and a little more

# running PID: a process that has ended but was not yet collected by its parent does not count.
running() { grep -qE '^State:[[:space:]]+[^ZX[:space:]]' "/proc/$1/status" 2> /dev/null; }

# stop LABEL: SIGTERM, then SIGKILL when the limit has passed. A pid that now belongs to something else is left alone.
stop() {
    local file=$run/$1.pid pid
    [ -e "$file" ] || return 0
    pid=$(cat "$file")
    if grep -qaE 'janua|nats-server|redis-server' "/proc/$pid/cmdline" 2> /dev/null; then
        kill "$pid" 2> /dev/null || true
        for ((tenths = 0; tenths < limit * 10; tenths++)); do
            running "$pid" || break
            sleep 0.1
        done
        if running "$pid"; then
            printf 'down: %s did not end within %s s and is killed\n' "$1" "$limit" >&2
            kill -KILL "$pid" 2> /dev/null || true
        fi
        printf 'down: stopped %s\n' "$1"
    fi
    rm -f "$file"
}

labels=(router tokenizer vision images)
for file in "$run"/language-*.pid "$run"/experts-*.pid; do
    [ -e "$file" ] && labels+=("$(basename "$file" .pid)")
done
for label in "${labels[@]}" redis nats; do stop "$label"; done
