"""The quickstart's checks and its closing table."""

import argparse
import hashlib
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from xdscale.names import resolve_path

METRICS = ("mlm_loss", "mlm_accuracy", "match_accuracy", "clip_token_accuracy")
LOG_NAMES = {
    "mlm_loss": "validation/loss/mlm",
    "mlm_accuracy": "validation/accuracy/mlm",
    "match_accuracy": "validation/accuracy/match",
    "clip_token_accuracy": "validation/accuracy/clip_tokens",
}


def verify(name: str, expected: str) -> None:
    """Ends with exit code 2 when a file shipped in a package is not the expected one."""
    path = resolve_path(name)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        sys.exit(f"error: {path}: SHA-256 is {found}, expected {expected}; reinstall the package")


def report(run: Path, seconds: int) -> None:
    """Loads the export, prints the table and writes `summary.json`."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [entry for entry in log if entry["kind"] == "validation"]
    rates = sorted(entry["throughput/tokens_per_second"] for entry in log if entry["kind"] == "step")
    newest = (run / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    summary = {
        "before": _metrics(validations[0]),
        "after": _metrics(validations[-1]),
        "chance": {"match_accuracy": 0.5, "clip_token_accuracy": _commonest_clip_token_share(run)},
        "tokens_per_second": rates[len(rates) // 2],
        "seconds": seconds,
        "paths": {
            "export": str(run / "export"),
            "report": str(run / "report" / "report.html"),
            "checkpoint": str(run / "checkpoints" / newest),
            "tensorboard": str(run / "tensorboard"),
            "log": str(run / "log.jsonl"),
        },
    }
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    parameters = _load_export(run / "export")
    _print(summary, validations[-1]["step"], parameters)


def _metrics(entry: dict) -> dict[str, float]:
    return {name: entry[LOG_NAMES[name]] for name in METRICS}


def _commonest_clip_token_share(run: Path) -> float:
    """Accuracy of always naming the commonest CLIP token of the held-out text."""
    import numpy as np
    import yaml

    from xdscale.shards.table import Table

    shards = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["data"]["shards"]
    split = Table(Path(shards), "validation")
    tokens, _ = split.read_ragged("clip", np.arange(len(split)))
    return float(np.bincount(tokens).max() / len(tokens))


def _load_export(folder: Path) -> int:
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)("A red apple on a wooden table.", return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    if not torch.isfinite(states).all():
        sys.exit(f"error: {folder}: the exported encoder gives non-finite states")
    return sum(parameter.numel() for parameter in model.parameters())


def _print(summary: dict, step: int, parameters: int) -> None:
    console = Console()
    table = Table("held-out articles", "before", f"after {step} steps", "chance")
    for name in METRICS:
        chance = summary["chance"].get(name)
        table.add_row(
            name.replace("_", " "),
            f"{summary['before'][name]:.3f}",
            f"{summary['after'][name]:.3f}",
            f"{chance:.3f}" if chance else "",
        )
    console.print(table)
    console.print(
        "CLIP's text tower had random weights: the figures show that everything runs and learns, not what "
        "visual knowledge adds.",
        soft_wrap=True,
    )
    paths = summary["paths"]
    console.print(
        f"{summary['tokens_per_second']:,.0f} tokens/s, {summary['seconds']} s in all; the export loads with "
        f"plain transformers ({parameters:,} parameters)",
        soft_wrap=True,
    )
    console.print(
        f"export      {paths['export']}\ncheckpoint  {paths['checkpoint']}\nTensorBoard {paths['tensorboard']}\n"
        f"finetuning  {paths['report']}",
        soft_wrap=True,
    )
    console.print(
        "\nnext:\n"
        f"  source {shlex.quote(str(_shown(Path(sys.prefix)) / 'bin' / 'activate'))}\n"
        "  xdscale recipes\n"
        "  xdscale recipes quickstart\n"
        "  xdscale train quickstart training.seed=1 output.folder=runs/quickstart-seed-1\n"
        "  xdscale plan xdbert-base-wikitext103 --gpus 8 --gpu A100-40G\n"
        f"  tensorboard --logdir {paths['tensorboard']}\n"
        "and with your own text or WikiText-103: README.md, 'XDBERT on WikiText-103'",
        soft_wrap=True,
        highlight=False,
    )


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify")
    check.add_argument("name")
    check.add_argument("sha256")
    closing = commands.add_parser("report")
    closing.add_argument("run", type=Path)
    closing.add_argument("--seconds", type=int, required=True)
    options = parser.parse_args()
    if options.command == "verify":
        verify(options.name, options.sha256)
    else:
        report(options.run, options.seconds)


if __name__ == "__main__":
    main()
