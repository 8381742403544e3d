"""Draws the picture world: python -m picture_world OUT, with this package's parent folder on the path."""

import argparse
from pathlib import Path

from .coco import write_coco, write_refcoco
from .flickr import write_flickr
from .nlvr2 import write_nlvr2
from .vcr import write_vcr

BENCHMARKS = {
    "coco": write_coco,
    "flickr30k": write_flickr,
    "nlvr2": write_nlvr2,
    "refcoco": write_refcoco,
    "vcr": write_vcr,
}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="picture_world", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=sorted(BENCHMARKS), default=sorted(BENCHMARKS))
    parser.add_argument("--train", type=int, default=1200, help="pictures to learn from, of each benchmark")
    parser.add_argument("--val", type=int, default=400, help="pictures of every other split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.only:
        BENCHMARKS[name](options.out, options.seed, {"train": options.train, "val": options.val})


if __name__ == "__main__":
    main()
