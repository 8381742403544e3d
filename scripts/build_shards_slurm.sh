#!/bin/bash
#SBATCH --job-name=shards
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Shards of a corpus by a Slurm array, one part per task, and a job that merges the parts when all are finished. PARTS and
# OUT, then what 'xdscale shards build' takes but --out and --part: a Wikipedia dump, or a folder of any text. The same
# command again continues where parts failed or ran out of time; parts that are finished take a moment.
#   bash scripts/build_shards_slurm.sh 16 data/wikipedia enwiki-latest-pages-articles-multistream.xml.bz2 --language-tokenizer bert-base-uncased
#   bash scripts/build_shards_slurm.sh 4 data/own my-texts --language-tokenizer bert-base-uncased
# Run it with xdscale on PATH, and OUT where all nodes see it. Limits: the lines above, or SBATCH_* (man sbatch).
set -euo pipefail
case "${1:-}" in
part) # PARTS OUT …, in each task of the array
    parts=$2
    out=$3
    shift 3
    exec xdscale shards build --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" --out "$out" --part "$SLURM_ARRAY_TASK_ID/$parts"
    ;;
merge) # OUT
    exec xdscale shards merge "$2"
    ;;
esac
if [ $# -lt 3 ] || ! [[ $1 =~ ^([2-9]|[1-9][0-9]+)$ ]]; then
    sed -n '8,13s/^# //p' "$0" >&2
    exit 2
fi
array=$(sbatch --parsable --array="0-$(($1 - 1))" "$0" part "$@")
array=${array%%;*} # where there are several clusters, ';' and the cluster's name follow
merge=$(sbatch --parsable --dependency="afterok:$array" --kill-on-invalid-dep=yes --cpus-per-task=1 "$0" merge "$2")
echo "parts 0 to $(($1 - 1)): job $array; merge: job ${merge%%;*}; then $2 is one dataset"
