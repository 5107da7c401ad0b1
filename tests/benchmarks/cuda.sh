#!/usr/bin/env bash
# The CUDA path in one command, in 8 minutes: its tests, the engine beside loops of transformers and the GPU's peak, and
# the roofline's prediction. It needs torch, transformers, pytest and what the core imports, neither Ray nor a network.
# Each step's output is kept in OUT. Prints one JSON line last; a step that fails or takes too long is an error.
#
#   tests/benchmarks/cuda.sh
#   GPU=A100 TOKENIZER=path/to/tokenizer OUT=folder tests/benchmarks/cuda.sh
#   DEVICE=cpu PROMPTS=8 tests/benchmarks/cuda.sh    # the script itself, on a machine without a GPU
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-$(mktemp -d)}
export HF_HUB_OFFLINE=1 PYTHONPATH=platform:jobs:serve:tests${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

step() { # NAME SECONDS COMMAND...
    local name=$1 most_s=$2 status=0
    shift 2
    echo "cuda: $name, at most $most_s s" >&2
    timeout --kill-after=10 "$most_s" "$python" "$@" > "$out/$name.out" 2> "$out/$name.err" || status=$?
    echo "$status" > "$out/$name.status"
}

step tests 150 -m pytest -q -p no:cacheprovider -m cuda tests/prefill_router/encoder/test_cuda.py
parts=(--depth --prefix)
[[ $device == cuda ]] || parts+=(--skip-loops) # which take minutes on a CPU
step extract 270 tests/benchmarks/extract.py --skip-ray --device "$device" "${parts[@]}" \
    --prompts "${PROMPTS:-4096}" ${TOKENIZER:+--tokenizer "$TOKENIZER"}
step roofline 60 tests/benchmarks/roofline.py --gpu "${GPU:-H100}"

exec "$python" - "$out" "$device" << 'END'
import json
import pathlib
import sys

out, device = pathlib.Path(sys.argv[1]), sys.argv[2]
report = {"benchmark": "cuda", "device": device}
failed = []
for name in ("tests", "extract", "roofline"):
    status = int((out / f"{name}.status").read_text())
    lines = (out / f"{name}.out").read_text().splitlines() or [""]
    report[name] = json.loads(lines[-1]) if lines[-1].startswith("{") else lines[-1]
    no_tests = name == "tests" and device != "cuda" and status == 5  # pytest's status where all are left out
    if status and not no_tests:
        failed.append(name)
        last = ((out / f"{name}.err").read_text().splitlines() or lines)[-1]
        print(f"cuda: {name}: status {status}: {last}: see {out}/{name}.err and .out", file=sys.stderr)
print(json.dumps(report | {"failed": failed}))
sys.exit(bool(failed))
END
