"""Real runs for scripts/gpu.sh: `python -m xdscale.bench.gpu_runs NAME OUT SCRATCH CONFIG RECIPE section.key=value …`.

A few steps on one rank, with a checkpoint after every second; its losses, norms and speeds are one JSON object in
OUT/runs.jsonl. With --compared-with RUN its losses are compared with those of RUN, which has the same settings. With
--killed the process is killed as soon as a checkpoint stands, and started again.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from xdscale.bench.gpu import Tell, teller
from xdscale.training.run_folder import read_log

CURVES = {
    "losses": "loss/total",
    "norms": "optim/grad_norm",
    "tokens_per_second": "throughput/tokens_per_second",
    "mfu_of_matrix_rate": "throughput/mfu",
    "peak_gib": "memory/peak_gib",
}
FIXED = (
    "model.language.weights=random", "model.language.sha256=null", "model.clip.weights=random",
    "run.eval_samples=4", "run.eval_every=999", "run.checkpoint_every=2",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Makes one run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="xdscale.bench.gpu_runs", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("scratch", type=Path, help="where the run folder may lie; checkpoints are gigabytes")
    parser.add_argument("config", help="DeepSpeed JSON")
    parser.add_argument("recipe", nargs="+", help="recipe and overrides")
    parser.add_argument("--compared-with", metavar="RUN", help="run of the same settings, left alone")
    parser.add_argument("--killed", action="store_true", help="kill it as soon as a checkpoint stands, and continue it")
    options = parser.parse_intermixed_args(arguments)
    folder = options.scratch / options.name
    command = [sys.executable, "-m", "xdscale.train", *options.recipe, *FIXED, f"output.folder={folder}"]
    command += ["--deepspeed_config", options.config]
    tell = teller(options.out / "runs.jsonl")
    if options.killed:
        tell(run=options.name, killed=_kill_after_checkpoint(command, folder))
    code = subprocess.run(command, check=False).returncode
    steps = [entry for entry in _log(folder) if entry["kind"] == "step"]
    curves = {name: [entry[key] for entry in steps] for name, key in CURVES.items()}
    tell(run=options.name, code=code, steps=[entry["step"] for entry in steps], **curves)
    if options.compared_with:
        _compare(tell, options.out / "runs.jsonl", options.name, curves["losses"], options.compared_with)
    return code


def _log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "log.jsonl"
    return read_log(path) if path.is_file() else []


def _kill_after_checkpoint(command: list[str], folder: Path) -> bool:
    """Starts a run and kills it once a checkpoint stands; returns whether it was still going on."""
    process = subprocess.Popen(command)
    while process.poll() is None and not list(folder.glob("checkpoints/step-*")):
        time.sleep(0.02)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return alive


def _compare(tell: Tell, path: Path, name: str, losses: list[float], other: str) -> None:
    findings = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    whole = next((found["losses"] for found in findings if found["run"] == other and "losses" in found), [])
    if not losses or len(whole) != len(losses):
        tell(run=name, compared_with=other, problem=f"{len(losses)} steps against {len(whole)}: nothing to compare")
        return
    largest = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, whole))
    tell(
        run=name,
        compared_with=other,
        compared_steps=len(losses),
        bitwise=losses == whole,
        largest_relative_difference=largest,
    )


if __name__ == "__main__":
    sys.exit(main())
