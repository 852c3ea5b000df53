#!/usr/bin/env bash
# The first ten minutes on a GPU, in this order: does it compile and give the right result, then the figures of graphs,
# then variants. Each step has a limit, and a step that fails does not stop the next one.
#
#   benchmarks/gpu_minutes.sh wheels FOLDER       # beforehand, where there is a package index
#   benchmarks/gpu_minutes.sh OUT [STEP...]       # on the machine with the GPU, from the root of a checkout
#
# Needs a python3 (or $PYTHON) with torch and triton. The step `tests` needs pytest, xdist and hypothesis as well;
# `tokenizer`, `float32` and `compiled` need numpy, pillow, safetensors and the wheels, in $WHEELS (default: wheels);
# `counters` needs ncu. A step whose needs are not there is skipped.
# COMMIT names the commit in a copy without its history. LIMIT_S ends every step earlier.
# Gives OUT/steps.csv, OUT/fusion.csv, OUT/tokenizer.csv, OUT/fused.ncu-rep, OUT/log.txt and OUT/summary.txt.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
STEPS="first tests fusion alone tokenizer float32 compiled counters sweep"

if [ "${1:-}" = wheels ] && [ $# = 2 ]; then
    # At the versions that the tests run with; Python 3.12 on x86_64.
    pins=$(grep -hE '^(pydantic|pydantic-core|annotated-types|typing-inspection|diffusers)==' requirements*.lock)
    # shellcheck disable=SC2086 # one argument for each pin
    exec "$PYTHON" -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d "$2" $pins
fi
if [ $# = 0 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0"
    exit 2
fi
OUT=$1
shift
for name in "$@"; do
    case " $STEPS " in *" $name "*) ;; *) echo "there is no step $name: $STEPS" >&2; exit 2 ;; esac
done
CHOSEN=" ${*:-$STEPS} "
mkdir -p "$OUT" || exit 2
OUT=$(cd "$OUT" && pwd)
[ -s "$OUT/steps.csv" ] || echo "step,result,seconds" >"$OUT/steps.csv"
touch "$OUT/log.txt" "$OUT/summary.txt"

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl \
        >>"$OUT/log.txt" 2>&1 && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

FIND="import sys, importlib.util as u; print(*[name for name in sys.argv[1:] if u.find_spec(name) is None][:1])"

record() { # step, result, seconds
    echo "$1,$2,$3" >>"$OUT/steps.csv"
    echo "$1: $2, $3 s" | tee -a "$OUT/summary.txt"
}

step() { # name, limit in seconds, modules that it needs, command...
    local name=$1 limit=${LIMIT_S:-$2} needs=$3 missing began log status result
    shift 3
    case "$CHOSEN" in *" $name "*) ;; *) return ;; esac
    command -v "$1" >/dev/null && missing="" || missing=$1
    # shellcheck disable=SC2086 # one argument for each module
    missing=${missing:-$("$PYTHON" -c "$FIND" $needs)}
    if [ -n "$missing" ]; then
        record "$name" "skipped without $missing" 0
        return
    fi
    log=$(mktemp)
    began=$(date +%s)
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1
    status=$?
    case $status in 0) result=done ;; 124 | 137) result="ended after $limit s" ;; *) result="failed with $status" ;; esac
    record "$name" "$result" $(($(date +%s) - began))
    { echo "== $name: $*"; cat "$log"; } >>"$OUT/log.txt"
    tail -n 30 "$log" | sed 's/^/    /' >>"$OUT/summary.txt"
    rm -f "$log"
}

fusion() { # name, limit, arguments...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "torch triton" "$PYTHON" -m benchmarks.fusion --device cuda --hidden-width 1536 "$@" \
        --output "$OUT/fusion.csv" ${COMMIT:+--commit "$COMMIT"}
}

tokenizer() { # name, limit, arguments...
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "torch triton pydantic safetensors PIL numpy" "$PYTHON" -m benchmarks.tokenizer \
        --device cuda "$@" --output "$OUT/tokenizer.csv" ${COMMIT:+--commit "$COMMIT"}
}

command -v nvidia-smi >/dev/null && nvidia-smi >>"$OUT/log.txt" 2>&1

# Compiles? Right? The first number: 0.86 ms is expected on an H100, and 0.8 to 1.1 would not surprise.
fusion first 60 --implementations folded fused --batch 64 --repeats 50
step tests 120 "torch triton pytest xdist" "$PYTHON" -m pytest tests/kernels/test_fused.py -n 8 -q -W default \
    -p no:cacheprovider -k "full_size or cuda_graph or bit_equal or hard or tiles or weight or vanish or buffer"
fusion fusion 120 --implementations definition folded fused fused_graph --hidden-width 1536 3072 \
    --batch 1 4 8 12 24 64 256 --repeats 60
# Without the definition beside it, whose power slows all others down.
fusion alone 30 --implementations fused_graph --batch 64 --repeats 200
tokenizer tokenizer 120 --batch 1 8 64 --repeats 50 --implementations encode_base encode_triton encode_base_graph \
    encode_graph diffusers_encode decode decode_graph diffusers_decode
tokenizer float32 60 --dtype float32 --batch 8 --repeats 20 --implementations encode_base encode_triton \
    encode_graph diffusers_encode
tokenizer compiled 120 --batch 64 --repeats 30 --implementations encode_base_graph encode_graph encode_blocks_graph \
    decode_graph decode_blocks_graph encode_compiled
step counters 60 "torch triton" ncu --clock-control none --set full -k "regex:measure|combine" -c 2 -f -o "$OUT/fused" \
    "$PYTHON" -m benchmarks.fusion --device cuda --implementations fused --batch 64 --hidden-width 1536 --repeats 1
fusion sweep 120 --implementations fused fused_fp8 fused_graph --batch 8 64 --repeats 40 --sweep

if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,clocks.sm,power.draw,temperature.gpu --format=csv >>"$OUT/summary.txt" 2>&1
fi
! grep -qE ',(failed|ended)' "$OUT/steps.csv"
