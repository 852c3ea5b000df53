#!/usr/bin/env bash
# Retrains the bundled generator and puts it in its place, draws 600 samples of it and 600 of Gaussian latents, measures
# both, draws the card's pictures and the latents of the page's second tab. Resumable: run it again.
# DRORAE_DATA names the folder with caltech12-256/.
set -euo pipefail
: "${DRORAE_DATA:?set DRORAE_DATA to the folder of the image packs}"
PYTHON=${PYTHON:-.venv/bin/python}
RUN=${RUN:-runs/mini/generator}
BUNDLED=${BUNDLED:-model/bundled/dit-dh-mini}
PAGES=${PAGES:-docs/mini/generator}
TAB=${TAB:-service/pages/site/generated}
SCALE=${SCALE:-5}
POINTS=${POINTS:-12}
# glibc otherwise returns every activation to the kernel and faults it in again.
export MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=4000000000
drorae() { "$PYTHON" -m cli.main "$@"; }
images=$DRORAE_DATA/caltech12-256/caltech12-256

if [ ! -d "$RUN/checkpoint" ]; then
  drorae train generator --config training/recipes/mini/generator.yaml --output "$RUN" --resume
fi
cp "$RUN"/checkpoint/* "$BUNDLED"
drorae generate "$RUN/checkpoint" --num 600 --points "$POINTS" --scale "$SCALE" --dtype bfloat16 --output "$RUN/samples"
drorae generate "$RUN/checkpoint" --num 600 --sampler gaussian --output "$RUN/gaussian"
for set in samples gaussian; do
  drorae evaluate-generation "$RUN/$set" --reference "$images-val.tar" --train "$images"-00[01].tar --output "$RUN/$set-report"
  cp "$RUN/$set-report/report.json" "$PAGES/$set.json"
done
"$PYTHON" -m training.studies.generator_card "$RUN" --samples "$RUN/samples" --output "$PAGES" --index "$TAB/index.json"
for folder in "$RUN"/samples/*/; do
  file=$TAB/$(basename "$folder")
  drorae generate "$RUN/checkpoint" --classes "$(basename "$folder")" --num 4 --points "$POINTS" --scale "$SCALE" \
    --dtype bfloat16 --output "$file.safetensors"
  drorae decode "$file.safetensors" "$file.jpg" --row 0
done
