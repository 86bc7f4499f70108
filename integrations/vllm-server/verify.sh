#!/usr/bin/env bash
# Check a running server: health, key, model, vectors, sizes, metrics; then qwen3-embeddings doctor.
#
#   QWEN3_EMBEDDINGS_API_KEY=… ./verify.sh [URL]     URL without /v1 (http://127.0.0.1:8000)
#
# Needs curl and python3. The key is read from the environment, or from .env in this folder, and is
# not shown in the process list. Exit code: 0 if every check passes, else 1.
set -uo pipefail

url=${1:-http://127.0.0.1:8000}
url=${url%/}
here=$(cd "$(dirname "$0")" && pwd)
if [ -z "${QWEN3_EMBEDDINGS_API_KEY:-}" ] && [ -r "$here/.env" ]; then
  QWEN3_EMBEDDINGS_API_KEY=$(sed -n 's/^QWEN3_EMBEDDINGS_API_KEY=//p' "$here/.env")
fi
key=${QWEN3_EMBEDDINGS_API_KEY:-}
failures=0
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

request() { # KEY, then curl's arguments: prints the status, leaves the body in $answer
  local bearer=$1
  shift
  curl --config <(printf 'header = "Authorization: Bearer %s"\n' "$bearer") \
    --silent --max-time 60 --output "$answer" --write-out '%{http_code}' "$@"
}

check() { # NAME, then a command: its success
  local name=$1
  shift
  if "$@"; then
    printf 'ok    %s\n' "$name"
  else
    printf 'FAIL  %s\n' "$name"
    failures=$((failures + 1))
  fi
}

embed() { # KEY, JSON members after "model" and "input": prints the status
  request "$1" "$url/v1/embeddings" --header 'Content-Type: application/json' --data-binary @- <<JSON
{"model": "$model", "input": ["Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:how do leaves make sugar", "Photosynthesis makes sugar in leaves."], "encoding_format": "float"${2:+, $2}}
JSON
}

vectors_are() { # SIZE or nothing: two vectors of unit length and of one size
  python3 - "$answer" "${1:-}" <<'PYTHON'
import json, math, sys

rows = [item["embedding"] for item in json.load(open(sys.argv[1]))["data"]]
sizes = {len(row) for row in rows}
norms = [math.sqrt(sum(value * value for value in row)) for row in rows]
right = len(rows) == 2 and len(sizes) == 1 and all(abs(norm - 1) < 1e-2 for norm in norms)
if sys.argv[2]:
    right = right and sizes == {int(sys.argv[2])}
print(f"      {len(rows)} vectors of {sizes.pop()} dimensions, lengths "
      + ", ".join(f"{norm:.4f}" for norm in norms))
sys.exit(not right)
PYTHON
}

check 'health' [ "$(request "$key" "$url/health")" = 200 ]
if [ "$failures" != 0 ]; then
  echo "Nothing answers at $url/health. Is the server still starting? Read its log."
  exit 1
fi

check 'model list' [ "$(request "$key" "$url/v1/models")" = 200 ]
model=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["data"][0]["id"])' "$answer" 2> /dev/null)
echo "      model ${model:-unknown}"

if [ -n "$key" ]; then
  check 'a wrong key is refused (401)' [ "$(request wrong "$url/v1/models")" = 401 ]
else
  echo 'warn  no key is set: everyone who reaches the port can use the server'
fi

check 'embeddings (200)' [ "$(embed "$key" '')" = 200 ]
check 'two vectors of unit length' vectors_are
check 'dimensions=32 is accepted (200)' [ "$(embed "$key" '"dimensions": 32')" = 200 ]
check 'and returns 32 dimensions' vectors_are 32
check 'a size out of range is refused (400)' [ "$(embed "$key" '"dimensions": 999999')" = 400 ]
check 'metrics of vLLM' [ "$(request '' "$url/metrics")" = 200 ]
check 'and they count texts' grep -q '^vllm:request_success_total' "$answer"

if command -v qwen3-embeddings > /dev/null; then
  export QWEN3_EMBEDDINGS_API_KEY=$key
  check 'qwen3-embeddings doctor' qwen3-embeddings doctor --base-url "$url/v1"
else
  echo "skip  doctor: pip install 'qwen3-embeddings[server]' for a check of the vectors themselves"
fi

[ "$failures" = 0 ] && echo 'All checks passed.' && exit 0
echo "$failures checks failed."
exit 1
