#!/usr/bin/env bash
# Retrains the bundled checkpoint: phases 0 to 3, phase 3's last block, the linear probe, the bundle. Resumable: run it again.
# DRORAE_DATA names the folder with photos-256/, caltech101-256/, tiny-imagenet-64/ and photos-256-val.tar.
# Where there is a GPU it is used, and takes all CPUs to decode images.
set -euo pipefail
: "${DRORAE_DATA:?set DRORAE_DATA to the folder of the image packs}"
PYTHON=${PYTHON:-.venv/bin/python}
RUNS=${RUNS:-runs/mini}
WORKERS=${WORKERS:-$(nproc)}
# glibc otherwise returns every activation to the kernel and faults it in again (a fifth of a step on CPU).
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000

before=
for phase in phase0 phase1 phase2 phase3 phase3-seams; do
  if [ ! -f "$RUNS/$phase/run.json" ]; then
    "$PYTHON" -m cli.main train "${phase%%-*}" --config "training/recipes/mini/$phase.yaml" --output "$RUNS/$phase" --resume \
      --set "data.num_workers=$WORKERS" ${before:+--set "init=$RUNS/$before/checkpoint"}
  fi
  before=$phase
done
tiny=$DRORAE_DATA/tiny-imagenet-64
"$PYTHON" -m training.studies.linear_probe --checkpoint "$RUNS/phase0/checkpoint" \
  --train "$tiny"/tiny-imagenet-64-00[01].tar.gz --validation "$tiny/tiny-imagenet-64-val.tar" \
  --output "$RUNS/probe.json"
"$PYTHON" -m training.studies.bundle "$RUNS" --validation "$DRORAE_DATA/photos-256-val.tar" \
  --readout-photos "$DRORAE_DATA/photos-256"
