"""What the regions demo needs beside the commands: controls to compare with, and the closing table."""

import argparse
import json
from pathlib import Path

import numpy as np

from xdscale.shards.regions import RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions


def write_controls(pictures: Path) -> None:
    """Writes PICTURES-shuffled, where each image has another one's regions, and PICTURES-blank, whose features are 0.

    Who learns from them has the same model, questions and steps, but nothing to see.
    """
    table = RegionTable.open(pictures)
    rows = np.arange(len(table))
    regions, ids = table.read(rows), table.image_ids(rows)
    other = np.random.default_rng(0).permutation(len(table))
    for name, order, factor in (("shuffled", other, 1), ("blank", rows, 0)):
        images = []
        for image_id, row in zip(ids, order.tolist()):
            part = slice(regions.offsets[row], regions.offsets[row + 1])
            width, height = regions.sizes[row].tolist()
            labels = {"confidences": regions.confidences[part]}
            features = regions.features[part] * np.float16(factor)
            images.append(RegionImage(image_id, (width, height), regions.boxes[part], features, labels))
        build_regions(images, pictures.with_name(f"{pictures.name}-{name}"), table.build.detector, format=name)


def report(run: Path, finetuned: Path, seconds: int) -> None:
    """Prints the table and writes `summary.json`."""
    from rich.console import Console
    from rich.table import Table

    accuracy = {}
    for label in ("images", "shuffled", "blank"):
        (path,) = (finetuned / label).glob("**/result.json")
        accuracy[label] = json.loads(path.read_text(encoding="utf-8"))["metrics"]["vqa_accuracy"]
    heads = np.genfromtxt(run / "grounding" / "heads.csv", delimiter=",", names=True)
    best = heads[heads["accuracy"].argmax()]
    grounding = {
        "best_head": float(best["accuracy"]),
        "head": f"{int(best['layer'])}-{int(best['head'])}",
        "confidence_baseline": float(best["baseline"]),
        "phrases": int(best["words"]),
    }
    summary = {"vqa_accuracy": accuracy, "grounding": grounding, "seconds": seconds}
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console = Console()
    table = Table("VQA accuracy", "with images", "images of other questions", "text alone")
    table.add_row("", *(f"{accuracy[label]:.3f}" for label in ("images", "shuffled", "blank")))
    console.print(table)
    console.print(
        f"grounding: head {grounding['head']} points at the right region for {grounding['best_head']:.1%} of "
        f"{grounding['phrases']:,} phrases, the most confident region is right for "
        f"{grounding['confidence_baseline']:.1%}\n{seconds} s in all; report {run / 'report' / 'report.html'}",
        soft_wrap=True,
    )


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    controls = commands.add_parser("controls")
    controls.add_argument("pictures", type=Path)
    closing = commands.add_parser("report")
    closing.add_argument("run", type=Path)
    closing.add_argument("finetuned", type=Path)
    closing.add_argument("--seconds", type=int, required=True)
    options = parser.parse_args()
    if options.command == "controls":
        write_controls(options.pictures)
    else:
        report(options.run, options.finetuned, options.seconds)


if __name__ == "__main__":
    main()
