"""Peak memory of a build does not grow with the corpus."""

import random
import re
import subprocess
import sys

import pytest

from xdscale.shards.corpus import read_documents

BUILD = """
import resource, sys
from pathlib import Path
from xdscale.shards.build import build_shards
build_shards([Path(sys.argv[1])], Path(sys.argv[2]), language_tokenizer="package:cognition/model",
             sequence_length=126, shard_text_bytes=1 << 17)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


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


def peak_kib(path, out):
    command = [sys.executable, "-c", BUILD, str(path), str(out)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_peak_memory_of_ten_times_the_text(articles, tmp_path):
    """1.4 and 14 MB in shards of 128 KiB of text: the larger build's peak is at most a tenth higher."""
    peaks = []
    for size in (1_400_000, 14_000_000):
        path = tmp_path / f"{size}.txt"
        write_corpus(path, articles, size)
        peaks.append(peak_kib(path, tmp_path / f"out-{size}"))
    assert peaks[1] <= 1.1 * peaks[0]
