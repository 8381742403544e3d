"""Writes a small real task with the YAML file that describes it: is a sentence of Wikipedia from a person's article?

No registry package ships GLUE's data. This question has a right answer, is a matter of what words mean, and a 2-layer
encoder learns it from a few hundred sentences (unlike word order: shuffled sentences it only learns by heart).
Everything is a function of the dump.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from xdscale.names import resolve_path
from xdscale.shards.sources.corpus import read_documents

_SENTENCE = re.compile(r"[A-Z][^.!?\t]*[a-z0-9)][.](?=\s|$)")
_WORDS = range(6, 20)
# "Abraham Lincoln (; February 12, 1809 - April 15, 1865) was the": a name, dates in brackets, and who it was.
_PERSON = re.compile(r"[^(]{3,60}\([^)]*(born|\d{1,4}\s*[–-])[^)]*\d{2}[^)]*\) (was|is) (an?|the) ")
_DESCRIPTION = """\
# A task for 'xdscale finetune --task': is a sentence from an article about a person?
title: Person
train: train.tsv                 # in the folder of this file
dev: dev.tsv
text: sentence
label: article
labels: [other, person]          # in the order of the classes
metrics: [matthews, accuracy]    # the first one stands in the report's column
"""
_MOST_PER_ARTICLE = {True: 60, False: 8}
"""Sentences: persons are few, and no article should fill the other class."""


def write_task(dump: Path, out: Path, *, train: int = 400, dev: int = 200) -> None:
    """Writes `OUT/person.yaml`, `train.tsv` and `dev.tsv`.

    Rows from a person's article and from another article take turns; the two files share no article.

    Args:
        dump: a Wikipedia dump, or any corpus that `xdscale shards build` reads.
        out: the folder.
        train: rows of the training split, at most.
        dev: rows of the development split, at most.
    """
    found: dict[tuple[str, bool], list[str]] = {(split, person): [] for split in ("train", "dev") for person in (0, 1)}
    articles = {True: 0, False: 0}
    for document in read_documents(dump):
        person = bool(_PERSON.match(" ".join(" ".join(document).split())))
        articles[person] += 1
        split = "dev" if articles[person] % 3 == 0 else "train"
        found[split, person] += list(sentences(document))[: _MOST_PER_ARTICLE[person]]
    out.mkdir(parents=True, exist_ok=True)
    (out / "person.yaml").write_text(_DESCRIPTION, encoding="utf-8")
    for split, rows in (("train", train), ("dev", dev)):
        pairs = zip(*(_spread(found[split, person], rows // 2) for person in (False, True)))
        lines = [f"{article}\t{text}\n" for pair in pairs for article, text in zip(("other", "person"), pair)]
        (out / f"{split}.tsv").write_text("article\tsentence\n" + "".join(lines), encoding="utf-8")


def sentences(document: list[str]) -> Iterator[str]:
    """Yields the plain sentences of a document, of 6 to 19 words."""
    for paragraph in document:
        for match in _SENTENCE.finditer(" ".join(paragraph.split())):
            if len(match[0].split()) in _WORDS:
                yield match[0]


def _spread(texts: list[str], count: int) -> list[str]:
    """Returns so many of the texts, from all articles alike."""
    count = min(count, len(texts))
    return [texts[place * len(texts) // count] for place in range(count)]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dump", help="Wikipedia dump, or package:NAME/file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=400, help="rows, at most")
    parser.add_argument("--dev", type=int, default=200, help="rows, at most")
    options = parser.parse_args()
    write_task(resolve_path(options.dump), options.out, train=options.train, dev=options.dev)


if __name__ == "__main__":
    main()
