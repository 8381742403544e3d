"""Writes a small real task in CoLA's public format: sentences of Wikipedia against the same with shuffled words.

No registry package ships GLUE's data, and CoLA asks just this: is it English? Everything is a function of the dump.
"""

import argparse
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from xdscale.names import resolve_path
from xdscale.shards.corpus import read_documents

_SENTENCE = re.compile(r"[A-Z][^.!?\t]*[a-z0-9)][.](?=\s|$)")
_WORDS = range(6, 26)


def write_task(dump: Path, out: Path, *, train: int = 600, dev: int = 200) -> None:
    """Writes `OUT/CoLA/train.tsv` and `dev.tsv`.

    Half of the rows are sentences (label 1), half are other sentences with their words in another order (label 0).

    Args:
        dump: a Wikipedia dump, or any corpus that `xdscale shards build` reads.
        out: gets the folder `CoLA`.
        train: rows of the training split.
        dev: rows of the development split, of other articles.
    """
    splits: dict[str, list[str]] = {"train": [], "dev": []}
    sizes = {"train": train, "dev": dev}
    for number, document in enumerate(read_documents(dump)):
        split = "dev" if number % 4 == 3 else "train"
        # A few sentences of each article, so that no article's subject fills the task.
        for place, sentence in enumerate(sentences(document)):
            if place == 24 or len(splits[split]) == sizes[split]:
                break
            splits[split].append(sentence)
        if all(len(splits[name]) == size for name, size in sizes.items()):
            break
    folder = out / "CoLA"
    folder.mkdir(parents=True, exist_ok=True)
    for split, texts in splits.items():
        lines = [cola_line(row, text) for row, text in enumerate(texts)]
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")


def sentences(document: list[str]) -> Iterator[str]:
    """Yields the plain sentences of a document, of 6 to 25 words."""
    for paragraph in document:
        for match in _SENTENCE.finditer(" ".join(paragraph.split())):
            if len(match[0].split()) in _WORDS:
                yield match[0]


def cola_line(row: int, sentence: str) -> str:
    """Returns one line of CoLA: source, label, the author's star, sentence."""
    if row % 2 == 0:
        return f"wiki\t1\t\t{sentence}\n"
    return f"wiki\t0\t*\t{shuffled(sentence)}\n"


def shuffled(sentence: str) -> str:
    """Returns the sentence with its words in another order; capital and full stop stay at their places."""
    words = sentence.rstrip(".").split()
    seed = int.from_bytes(hashlib.sha256(sentence.encode()).digest()[:8], "big")
    order = np.random.default_rng(seed).permutation(len(words))
    mixed = [words[index] for index in order]
    mixed[int(np.argmin(order))] = words[0][0].lower() + words[0][1:]
    mixed[0] = mixed[0][0].upper() + mixed[0][1:]
    return " ".join(mixed) + "."


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dump", help="Wikipedia dump, or package:NAME/file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=600, help="rows")
    parser.add_argument("--dev", type=int, default=200, help="rows")
    options = parser.parse_args()
    write_task(resolve_path(options.dump), options.out, train=options.train, dev=options.dev)


if __name__ == "__main__":
    main()
