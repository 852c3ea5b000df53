#!/usr/bin/env bash
# Retrains the bundled checkpoint: phases 0 to 3, the linear probe, the bundle. Resumable: run it again.
# DRORAE_DATA names the folder with photos-256/, caltech101-256/, tiny-imagenet-64/ and photos-256-val.tar.
set -euo pipefail
: "${DRORAE_DATA:?set DRORAE_DATA to the folder of the image packs}"
BIN=${BIN:-.venv/bin}
RUNS=${RUNS:-runs/mini}
# glibc otherwise returns every activation to the kernel and faults it in again (a fifth of a step on CPU).
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

for name in phase0 phase0-continued phase1 phase2 phase3; do
  if [ ! -f "$RUNS/$name/run.json" ]; then
    "$BIN/drorae" train "${name%-continued}" --config "training/recipes/mini-$name.yaml" --output "$RUNS/$name" --resume
  fi
done
tiny=$DRORAE_DATA/tiny-imagenet-64
"$BIN/python" -m training.probe --checkpoint "$RUNS/phase0-continued/checkpoint" \
  --train "$tiny"/tiny-imagenet-64-00[01].tar.gz --validation "$tiny/tiny-imagenet-64-val.tar" \
  --output "$RUNS/probe.json"
"$BIN/python" -m training.bundle "$RUNS" --validation "$DRORAE_DATA/photos-256-val.tar" \
  --readout-photos "$DRORAE_DATA/photos-256"
