#!/usr/bin/env bash
# What xdscale does on this machine's GPU, in at most ten minutes: bash scripts/gpu.sh [OUT]
#
# Parts run in an order in which a stop at any point leaves something learnt; each writes OUT/PART.txt and OUT/PART.jsonl
# at once. Without a GPU the same parts run on the CPU in a tiny form. Environment:
#   PYTHON           interpreter that xdscale is installed for; default: python3
#   SHARDS           shards of BERT's ids, 510 per sequence; default: built of the small dump that the package gensim ships
#   SECONDS_IN_ALL   when they are over, no part begins or goes on; default: 590
#   PARTS            names of the parts that run, as they are printed; default: all. Runs bring the part shards along
# What an earlier run found in OUT is moved into a folder there.
set -uo pipefail
unset CDPATH # which cd would follow
SECONDS=0    # an exported one would be counted
from=$PWD
cd "$(dirname "$0")/.." || exit 2
within() { [[ $1 == /* ]] && echo "$1" || echo "$from/$1"; } # as the caller means it
no_path() { [[ $1 == *://* || $1 == package:* ]]; }
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(within "$python")
limit=${SECONDS_IN_ALL:-590}
if [[ ! $limit =~ ^[0-9]{1,9}$ ]]; then
    echo "error: SECONDS_IN_ALL: $limit; expected a number of seconds, such as 590" >&2
    exit 2
fi
limit=$((10#$limit))
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
known=(versions kernels step shards runs-zero2 runs-zero2-killed rivals runs-zero1 runs-zero3 runs-zero0 runs-zero2-again
    runs-large definitions repeats compare step_rivals tiles planned)
read -rd '' -a named <<<"${PARTS:-}" # from several lines, too
PARTS=${named[*]}
for name in "${named[@]}"; do
    if [[ " ${known[*]} " != *" $name "* ]]; then
        echo "error: PARTS: no part $name; there are ${known[*]}" >&2
        exit 2
    fi
done
if [[ -n ${SHARDS:-} && ! -e $(within "$SHARDS")/dataset.json ]] && ! no_path "$SHARDS"; then
    echo "error: SHARDS: $(within "$SHARDS") holds no dataset.json; make it with 'xdscale shards build', or leave SHARDS out" >&2
    exit 2
fi
[[ " ${PARTS:-}" == *" runs-"* && -z ${SHARDS:-} ]] && PARTS+=" shards"
gpus=$("$python" -c 'import importlib.util, typer; assert importlib.util.find_spec("torch"), "no torch"
from xdscale.devices import visible_gpus; print(len(visible_gpus()))' 2>&1) || {
    echo "error: PYTHON: $python has no xdscale with all that it needs (${gpus##*$'\n'}); activate its environment" \
        "('source .venv/bin/activate'), or name its interpreter" >&2
    exit 2
}
gpus=${gpus##*$'\n'} # without Python's warnings
[ "$gpus" -gt 0 ] && echo "GPUs: $gpus, of which one is used" || echo "no GPU was found: a tiny form runs on the CPU"
out=$(within "${1:-runs/gpu}")
mkdir -p "$out" || exit 2
if [ -n "$(ls -A "$out")" ] && [ ! -e "$out/parts.txt" ]; then
    echo "error: $out: holds other files than an earlier run's; name an empty or new folder" >&2
    exit 2
elif [ -e "$out/parts.txt" ]; then
    earlier=$out/until-$(date +%Y%m%d-%H%M%S-%N)
    mkdir "$earlier"
    find "$out" -maxdepth 1 -type f -exec mv -t "$earlier" {} +
    echo "what was found here before is now in $earlier"
fi
echo "${PARTS:-all}" >"$out/parts.txt" || exit 2
# Checkpoints of gigabytes go to memory where there is some.
scratch=$(mktemp -d "$([ -w /dev/shm ] && echo /dev/shm || echo /tmp)/xdscale-gpu.XXXXXX") || exit 2
trap 'rm -rf "$scratch"' EXIT

chosen() { [[ " ${PARTS:-$1} " == *" $1 "* ]]; }
# part SECONDS NAME COMMAND…: for at most so many seconds, or what is left; its words go to OUT/NAME.txt and their end here.
part() {
    local seconds=$(($1 * patience)) name=$2 left=$((limit - SECONDS)) code=0
    shift 2
    chosen "$name" || return 0
    if [ "$left" -lt 5 ]; then
        echo "== $name: left out, the time is up"
        return 1
    fi
    echo "== $name, from $SECONDS s on"
    timeout --kill-after=10 "$((seconds < left ? seconds : left))" "$@" >>"$out/$name.txt" 2>&1 || code=$?
    tail -n 20 "$out/$name.txt" | cut -c1-240
    [ "$code" -eq 0 ] || echo "   ended with $code (124: its time was up); see $out/$name.txt"
    return "$code"
}
patience=1
measure=("$python" -m xdscale.bench.gpu)
xdscale=("$python" -m xdscale)

if [ "$gpus" -gt 0 ]; then
    [ -n "${CUDA_VISIBLE_DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES=0
    base=(xdbert-base-wikitext103) large=(xdelectra-large-wikitext103)
    micros=(36 144) rivals_micro=96 large_micros=(18 72) compared=2 length=510 steps=6 batch=()
    gpu=$("$python" -c 'import torch; from xdscale.plan.hardware import gpu_of_device as f; g = f(torch.device("cuda")); print(g.name if g else "H100-80G")')
    config() {
        # Stage 0 sums gradients in the precision that it trains in, and in no other.
        [ "$1" -gt 0 ] || sed -z 's/"stage": 2/"stage": 0/; s/"data_types": {[^}]*},\n *//' \
            ds_configs/bert-base-zero2.json >"$scratch/zero0.json"
        [ "$1" -gt 0 ] && echo "bert-base-zero$1" || echo "$scratch/zero0.json"
    }
    large_config=electra-large-zero2
else
    patience=4 # a CPU may be busy with other things
    export DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    base=(quickstart model.cross_layers=1) large=(quickstart)
    micros=(2) rivals_micro=2 large_micros=(1) compared=1 length=126 steps=4 batch=(training.global_batch=4) gpu=H100-80G
    config() {
        echo "{\"train_micro_batch_size_per_gpu\": 2, \"zero_optimization\": {\"stage\": $1}}" >"$scratch/zero$1.json"
        echo "$scratch/zero$1.json"
    }
    large_config=$(config 2)
fi

part 60 versions "${measure[@]}" versions "$out"
part 150 kernels "${measure[@]}" kernels "$out"
part 120 step "${measure[@]}" step "$out" "${base[@]}" "${micros[@]}"

shards=${SHARDS:-$scratch/shards}
no_path "$shards" || shards=$(within "$shards")
dump=package:gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2
[ -n "${SHARDS:-}" ] || part 60 shards "${xdscale[@]}" shards build "$dump" --out "$shards" --workers 2 \
    --language-tokenizer package:cognition/model --sequence-length "$length" --validation-fraction 0.1
run() { # SECONDS NAME CONFIG RECIPE…
    part "$1" "runs-$2" "$python" -m xdscale.bench.gpu_runs "$2" "$out" "$scratch" "${@:3}" data.shards="$shards" \
        training.steps="$steps" "${batch[@]}"
    rm -rf "${scratch:?}/$2"
}
run 90 zero2 "$(config 2)" "${base[@]}"
run 120 zero2-killed "$(config 2)" "${base[@]}" --compared-with zero2 --killed
part 180 rivals "${measure[@]}" rivals "$out"
part 90 step "${measure[@]}" step "$out" "${large[@]}" "${large_micros[@]}"
run 70 zero1 "$(config 1)" "${base[@]}"
run 80 zero3 "$(config 3)" "${base[@]}"
run 70 zero0 "$(config 0)" "${base[@]}"
run 70 zero2-again "$(config 2)" "${base[@]}" --compared-with zero2
run 90 large "$large_config" "${large[@]}"
part 90 definitions "${measure[@]}" definitions "$out" "${base[@]}" "$compared"
part 60 repeats "${measure[@]}" repeats "$out" "${base[@]}" "${micros[0]}"
part 60 compare "${measure[@]}" compare "$out" "${base[@]}" "$compared"
part 150 step_rivals "${measure[@]}" step_rivals "$out" "${base[@]}" "$rivals_micro"
part 90 tiles "${measure[@]}" tiles "$out"
plans=()
for recipe in "${base[0]}" "${large[0]}"; do
    chosen planned || break
    "${xdscale[@]}" plan "$recipe" --gpus 1 --gpu "$gpu" --json >"$out/plan-$recipe.json" && plans+=("$out/plan-$recipe.json")
done
limit=$((SECONDS + 30)) # whatever the time: what is there already is only put side by side
part 30 planned "${measure[@]}" planned "$out" "${plans[@]}"
echo "== done after $SECONDS s; everything is in $out"
