#!/usr/bin/env bash
# curl: an answer with its headers (x-router-selected-model names the chosen model), then a stream.
set -euo pipefail

ask() {
  curl --silent --show-error --fail-with-body --no-buffer "${PREFILL_ROUTER_URL:-http://127.0.0.1:8000/v1}/chat/completions" \
    --header "Authorization: Bearer ${PREFILL_ROUTER_KEY:-none}" --header 'Content-Type: application/json' "$@"
}

ask --include --data '{"model": "auto", "messages": [{"role": "user", "content": "What is 17 * 23?"}]}'
echo
ask --data '{"model": "auto", "stream": true, "messages": [{"role": "user", "content": "Count to three."}]}'
