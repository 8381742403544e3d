"""What the demos with images need beside the commands: controls to compare with, and the closing tables."""

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

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
        out, whole_image = pictures.with_name(f"{pictures.name}-{name}"), table.build.whole_image
        build_regions(images, out, table.build.detector, format=name, whole_image=whole_image)


def report(run: Path, finetuned: Path, seconds: int) -> None:
    """Prints the table and writes `summary.json`."""
    accuracy = {label: _metrics(finetuned / label)["vqa_accuracy"] for label in ("images", "shuffled", "blank")}
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


def report_pixels(run: Path, finetuned: Path, seconds: int) -> None:
    """Prints what the demo from pixels came to, and writes `summary.json`."""
    splits = {"val": "recall_at_1", "testA": "recall_at_1_testA", "testB": "recall_at_1_testB"}
    accuracy = {}
    for label in ("images", "blank"):
        metrics = _metrics(finetuned / label)
        accuracy[label] = {split: metrics[name] for split, name in splits.items()}
    rows = np.genfromtxt(run / "features.csv", delimiter=",", names=True)
    cosine = {"mean": float(np.average(rows["cosine"], weights=rows["matched"])), "lowest": rows["lowest_cosine"].min()}
    summary = {"refcoco_plus_accuracy": accuracy, "cosine_before_and_after": cosine, "seconds": seconds}
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console = Console()
    table = Table("RefCOCO+ accuracy", *splits)
    names = {"images": "what is seen in boxes", "blank": "boxes alone"}
    for label, name in names.items():
        table.add_row(name, *(f"{accuracy[label][split]:.3f}" for split in splits))
    console.print(table)
    console.print(
        f"features of the same boxes before and after: cosine {cosine['mean']:.3f} in the mean, "
        f"{cosine['lowest']:.3f} at least\n{seconds} s in all",
        soft_wrap=True,
    )


def _metrics(folder: Path) -> dict[str, float]:
    """Returns what the one run below a folder came to."""
    (path,) = folder.glob("**/result.json")
    return json.loads(path.read_text(encoding="utf-8"))["metrics"]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    controls = commands.add_parser("controls")
    controls.add_argument("pictures", type=Path)
    closings = {"report": report, "report-pixels": report_pixels}
    for name in closings:
        closing = commands.add_parser(name)
        closing.add_argument("run", type=Path)
        closing.add_argument("finetuned", type=Path)
        closing.add_argument("--seconds", type=int, required=True)
    options = parser.parse_args()
    if options.command == "controls":
        write_controls(options.pictures)
    else:
        closings[options.command](options.run, options.finetuned, options.seconds)


if __name__ == "__main__":
    main()
