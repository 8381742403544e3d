"""Peak memory of a build does not grow with the corpus.

`XDSCALE_MEMORY_MB=50,1000` measures those sizes instead of the small ones; `-s` prints the peaks.
"""

import os
import random
import re
import subprocess
import sys

import pytest

from xdscale.shards.sources.corpus import read_documents

BUILD = """
import resource, sys
from pathlib import Path
from xdscale.shards.sources.text import TextOptions, build_shards
options = TextOptions(
    language_tokenizer="package:cognition/model", sequence_length=126, shard_text_bytes=int(sys.argv[3])
)
build_shards([Path(sys.argv[1])], Path(sys.argv[2]), options, workers=2)
print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
SIZES = [round(float(size) * 1e6) for size in os.environ.get("XDSCALE_MEMORY_MB", "1.4,14").split(",")]


@pytest.fixture(scope="module")
def articles(wiki_dump):
    found = ["\n".join(document) for document in read_documents(wiki_dump) if document]
    return [text[:20_000] for text in found]


def write_corpus(path, articles, size):
    """The articles again and again, each time with the words of every paragraph turned by some places."""
    chance = random.Random(4)
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            turned = (re.sub(r"[^\n]+", lambda line: turn(line[0], chance), text) for text in articles)
            stream.write("\n\n".join(turned) + "\n\n")


def turn(line, chance):
    words = line.split()
    start = chance.randrange(len(words))
    return " ".join(words[start:] + words[:start])


def peaks_kib(path, out):
    """Of the process that reads and writes down, and of the larger of its two workers."""
    command = [sys.executable, "-c", BUILD, str(path), str(out), str(min(SIZES) // 11)]
    return [int(peak) for peak in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.timeout(7200 if "XDSCALE_MEMORY_MB" in os.environ else 600)
@pytest.mark.slow
def test_peak_memory_of_more_text(articles, tmp_path):
    """1.4 and 14 MB, in shards of a tenth of the smaller: the larger build's peaks are at most a tenth higher."""
    peaks = []
    for size in SIZES:
        path = tmp_path / f"{size}.txt"
        write_corpus(path, articles, size)
        peaks.append(peaks_kib(path, tmp_path / f"out-{size}"))
        path.unlink()
        print(f"{size / 1e6:g} MB of text: peaks of {peaks[-1][0] / 1024:.0f} and {peaks[-1][1] / 1024:.0f} MiB")
    assert all(large <= 1.1 * small for small, large in zip(*peaks))
