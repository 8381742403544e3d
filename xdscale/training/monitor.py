"""What a run tells: TensorBoard, `log.jsonl`, and one line or bar of progress; written by the first rank only."""

import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from xdscale.data.token_order import TokenSplit
from xdscale.ds_config import BatchSplit
from xdscale.errors import writing
from xdscale.files import count_of
from xdscale.recipe import Recipe
from xdscale.shards.progress import time_left
from xdscale.systems.contract import Objective
from xdscale.training.board import Board
from xdscale.training.run_folder import RunFolder

SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal for a bar."""


class Monitor:
    """Writes the records of a run.

    Args:
        run: the claimed run folder.
        recipe: the resolved recipe, shown as text and as hyper-parameters.
        start_step: steps already done; what an earlier process wrote after it is dropped.
        objectives: by name.

    Raises:
        XdscaleError: here and in every method, the folder takes no files.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, start_step: int, objectives: Mapping[str, Objective]) -> None:
        self._folder = run.folder
        self._recipe = recipe
        self._objectives = tuple(objectives)
        threading.excepthook = _leave_to_the_writer
        with self._writing():
            if start_step == 0:
                # What a run left that died before its first checkpoint would lie under the new curves.
                run.log.unlink(missing_ok=True)
            run.truncate_log(start_step)
            # A file without a buffer: what a full disk did not take is not tried again when the file is closed.
            self._log = run.log.open("ab", buffering=0)
            self._board = Board(run.tensorboard, objectives, start_step)
            if start_step == 0:
                self._add_recipe(0)
        self._progress = _progress_bar(recipe.training.steps, start_step)
        self._last_line_seconds = 0.0
        self._first_step: tuple[int, float] | None = None
        self._validated: dict[str, float] = {}

    def step(self, step: int, scalars: dict[str, float], samples: str) -> None:
        """Records one optimiser step.

        Args:
            step: steps done, counting this one.
            scalars: TensorBoard names and values.
            samples: hash of the global batch's sample ids.
        """
        self._write(step, "step", scalars, {"samples": samples})
        self._show(step, scalars)

    def skipped(self, step: int, entry: dict[str, Any], samples: str, total: int) -> None:
        """Records a step that was left out because its loss or gradient was not finite, and warns.

        Args:
            step: the step, counted from 1.
            entry: what `describe_skip` returned.
            samples: hash of the global batch's sample ids.
            total: skipped steps of the run, counting this one.
        """
        self._write(step, "skipped", {"health/skipped_steps": total}, {**entry, "samples": samples})
        where = "; ".join(
            f"rank {suspect['rank']}, micro-batch {suspect['micro_batch']}, samples "
            + ", ".join(map(str, suspect["sample_ids"]))
            for suspect in entry["suspects"][:3]
        )
        what = f"the loss is not finite ({where})" if where else "the gradient is not finite"
        self.message(f"warning: step {step} skipped on all ranks: {what}; see why: {entry['replay']}")

    def validation(self, step: int, scalars: dict[str, float]) -> None:
        """Records the held-out losses and accuracies after `step` steps."""
        self._write(step, "validation", {f"validation/{name}": value for name, value in scalars.items()}, {})
        self._validated = scalars
        text = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
        without = ", ".join(f"{name} – (no targets)" for name in self._objectives if f"loss/{name}" not in scalars)
        self.message(f"step {step}: held-out {', '.join(filter(None, (text, without)))}")

    def attention(self, step: int, layer: int, weights: np.ndarray) -> None:
        """Adds one cross-attention map, language positions × CLIP positions, scaled to its largest weight."""
        with self._writing():
            image = weights / weights.max()
            self._board.writer.add_image(f"cross_attention/layer_{layer}", image, step, dataformats="HW")

    def checkpoint(self, step: int) -> None:
        """Records that a checkpoint of `step` was published."""
        self._write(step, "checkpoint", {}, {})

    def changed(self, step: int, changes: list[str]) -> None:
        """Records what is other than before in a run that continues, and says it.

        Args:
            step: steps done.
            changes: one phrase per value.
        """
        self._write(step, "changed", {}, {"changes": changes})
        with self._writing():
            self._add_recipe(step)
        text = f"changed since the last start: {'; '.join(changes)}"
        if any(change.startswith("recipe.training.steps ") for change in changes):
            steps = self._recipe.training.steps
            text += f"; from step {step + 1} on the learning rate is that of a run of {count_of(steps, 'step')}"
        self.message(text)

    def quarantine(self, step: int, problems: dict[str, str]) -> None:
        """Records the shards that the run does without from `step` on.

        Args:
            step: steps done.
            problems: what is wrong with each shard, by file name; may be none, after shards were repaired.
        """
        self._write(step, "quarantine", {"data/quarantined_shards": len(problems)}, {"shards": problems})
        with self._writing():
            self._board.writer.add_text("quarantined shards", "\n\n".join(problems.values()) or "none", step)
        if problems:
            self.message("\n".join([f"shards in quarantine from step {step} on: {len(problems)}", *problems.values()]))

    def split(self, step: int, split: BatchSplit | TokenSplit) -> None:
        """Records how each step is split over ranks from `step` on."""
        self._write(step, "start", {}, split._asdict() | {"padding": split.padding})
        self.message(str(split))

    def end(self, step: int, peaks_gib: list[float], stopped: bool) -> None:
        """Says how the process ended and closes the files.

        The last held-out metrics go to TensorBoard's HParams, where runs are compared.

        Args:
            step: steps done.
            peaks_gib: peak memory of each rank.
            stopped: whether a signal ended the run.
        """
        steps = self._recipe.training.steps
        self._write(step, "end", {}, {"stopped": stopped, "memory/peak_gib_per_rank": peaks_gib})
        final = {f"final/{name}": value for name, value in self._validated.items()}
        with self._writing():
            self._board.end(_flatten(self._recipe.model_dump(mode="json")), final, step)
            self._log.close()
        how, what_next = "done", ""
        if stopped:
            how, what_next = "stopped by a signal", "; the same command continues"
        elif step < steps:
            stop_at, training = self._recipe.run.stop_at_step, self._recipe.training
            if stop_at is not None and step >= stop_at:
                how = "stopped"
                what_next = (
                    f", as run.stop_at_step = {stop_at} says; the same command without it, or with a later one, "
                    "continues"
                )
            else:
                waited = count_of(training.patience, "validation")
                how, what_next = "ended", f": {waited} in a row had no better {training.best}"
        memory = f"peak memory {max(peaks_gib):.2f} GiB per rank"
        self.message(f"{how} after step {step} of {steps}{what_next}; {memory}; run folder {self._folder}")
        if self._progress:
            self._progress[0].stop()

    def _write(self, step: int, kind: str, scalars: dict[str, float], extra: dict[str, Any]) -> None:
        entry = {"step": step, "kind": kind, **scalars, **extra}
        line = json.dumps({name: _in_words(value) for name, value in entry.items()}) + "\n"
        with self._writing():
            self._log.write(line.encode())
            self._board.scalars(scalars, step)

    def _writing(self) -> AbstractContextManager[None]:
        return writing("the log and TensorBoard's files", self._folder)

    def _add_recipe(self, step: int) -> None:
        self._board.writer.add_text("recipe", "```yaml\n" + self._recipe.to_yaml() + "```", step)

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        losses = "  ".join(f"{name[5:]} {value:.3f}" for name, value in scalars.items() if name.startswith("loss/"))
        text = (
            f"loss {losses}  {scalars['throughput/tokens_per_second']:,.0f} tokens/s  "
            f"data wait {scalars['data/wait_fraction']:.1%}"
        )
        now, steps = time.monotonic(), self._recipe.training.steps
        first, began = self._first_step = self._first_step or (step, now)
        if self._progress:
            self._progress[0].update(self._progress[1], completed=step, status=text)
        elif now - self._last_line_seconds > SECONDS_BETWEEN_LINES:
            self._last_line_seconds = now
            left = f"  {time_left((steps - step) * (now - began) / (step - first))}" if step > first else ""
            self.message(f"step {step}/{steps}: {text}{left}")

    def message(self, text: str) -> None:
        """Says something to the person at the terminal."""
        if self._progress:
            # As it is: a path may hold what rich takes for markup, and is copied whole.
            self._progress[0].console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _leave_to_the_writer(arguments: threading.ExceptHookArgs) -> None:
    """Prints what ends a thread, but for TensorBoard's: the next call of its writer raises that again."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


def _in_words(value: Any) -> Any:
    """Returns a value, with `nan`, `inf` and `-inf` as words, which JSON has no numbers for."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _progress_bar(steps: int, done: int) -> tuple[Progress, Any] | None:
    console = Console(stderr=True)
    if not console.is_terminal:
        return None
    # In a narrow terminal the losses alone are broken into lines; rich would leave the number of the step out.
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(bar_width=10),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[status]}", table_column=Column()),
        console=console,
    )
    bar.start()
    return bar, bar.add_task("", total=steps, completed=done, status="")


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str | float | int | bool]:
    flat: dict[str, str | float | int | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (str, float, int, bool)) else str(value)
    return flat
