#!/usr/bin/env bash
# Shards of a corpus on one machine, with all its cores, verified in the end. OUT, then what 'xdscale shards build' takes
# but --out: a Wikipedia dump, or a folder of any text. The same command again continues a build that was stopped.
#   bash scripts/build_shards.sh data/wikipedia enwiki-latest-pages-articles-multistream.xml.bz2 --language-tokenizer bert-base-uncased
#   bash scripts/build_shards.sh data/own my-texts --language-tokenizer bert-base-uncased
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
out=$1
shift
xdscale shards build --workers "$(nproc)" "$@" --out "$out"
xdscale shards verify "$out"
