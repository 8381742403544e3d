"""What TensorBoard is told of a run: curves with titles, units and descriptions, and a layout without empty charts."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.scalar.metadata import create_summary_metadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from xdscale.systems.contract import Objective

_OBJECTIVES = {
    "mlm": "masked language modelling",
    "match": "same text or not (MATCH)",
    "clip_tokens": "CLIP tokens",
    "task": "the finetuning task",
}
_LOSS = "Mean over the targets of the global batch: minus the natural logarithm, or squared error of a regression."
_ACCURACY = "Share of the targets of the global batch that are predicted right; of a regression, that come near."
_METRIC = "Mean over the targets of the global batch."
_HELD_OUT = "Always the same held-out samples with the same masks, without dropout. "
_LAST = "The last held-out figure of the run, which HParams compares runs by. "

_TITLES = {
    "loss/total": ("total loss", "The objectives' mean losses, times their weights in the recipe, added up."),
    "optim/lr": ("learning rate", "The optimizer's rate in this step, as warm-up and schedule give it."),
    "optim/grad_norm": (
        "gradient norm, before clipping",
        "L2 norm of the global batch's gradient, all ranks together.",
    ),
    "throughput/tokens_per_second": (
        "throughput (language tokens/s)",
        "Language tokens of the global batch, over the time of the whole step.",
    ),
    "throughput/mfu": (
        "model FLOPs utilisation (share of this device's measured matrix rate)",
        "FLOPs of the first rank's matrix products in forward and backward, over the time of the whole step, relative "
        "to what the same device reached on a plain square matrix product in the run's precision when the process "
        "started: not to the peak of its data sheet.",
    ),
    "data/wait_fraction": ("waiting for data (share of the step)", "Time for which the first rank had no batch yet."),
    "data/quarantined_shards": ("shards in quarantine (count)", "Damaged shards that the run does without."),
    "memory/peak_gib": (
        "peak memory (GiB)",
        "Of the first rank, since the process started: allocated on its GPU, or its resident set on a CPU.",
    ),
    "health/skipped_steps": ("skipped steps (count so far)", "Left out because loss or gradient was not finite."),
    "health/loss_scale_overflows": (
        "loss scale overflows (count so far)",
        "fp16 only: steps that DeepSpeed left out to find a loss scale; some are normal.",
    ),
}

_SETTINGS = ".hparams"
"""How the name of the file ends that holds the settings for HParams."""


class Board:
    """The event files of one run, all in one folder: a run that continues stays one run.

    Args:
        folder: of the event files.
        objectives: by name.
        start_step: steps already done; what an earlier process wrote after it is dropped.
    """

    def __init__(self, folder: Path, objectives: Mapping[str, Objective], start_step: int) -> None:
        if start_step == 0:
            shutil.rmtree(folder, ignore_errors=True)
        for settings in folder.glob(f"*{_SETTINGS}"):
            settings.unlink()  # of the end before: TensorBoard would keep the first ones that it reads
        self._folder = folder
        self._described: set[str] = set()
        # Every process says where it starts: TensorBoard takes the first such word for a beginning and drops nothing.
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else 0)
        if start_step == 0:
            self.writer.add_custom_scalars(layout(objectives))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Adds one point to each of some curves."""
        for tag, value in values.items():
            first, metadata = tag not in self._described, None
            if first:  # TensorBoard keeps what the first point says
                self._described.add(tag)
                metadata = create_summary_metadata(*describe(tag))
            point = Summary.Value(tag=tag, simple_value=value, metadata=metadata)
            self.writer.file_writer.add_summary(Summary(value=[point]), step)

    def end(self, settings: dict[str, str | float | int | bool], final: dict[str, float], step: int) -> None:
        """Adds settings and last held-out figures for HParams, in this run itself, and closes the files."""
        if final:
            self.scalars(final, step)
            with SummaryWriter(str(self._folder), filename_suffix=_SETTINGS) as writer:
                for summary in hparams(settings, final):
                    writer.file_writer.add_summary(summary, step)
        self.writer.close()


def describe(tag: str) -> tuple[str, str]:
    """Returns the title, with its unit, and the description of a curve."""
    for prefix, when, text in (("validation/", "held-out ", _HELD_OUT), ("final/", "last held-out ", _LAST)):
        if tag.startswith(prefix):
            title, description = describe(tag.removeprefix(prefix))
            return when + title, text + description
    if tag in _TITLES:
        return _TITLES[tag]
    kind, _, name = tag.partition("/")
    of = _OBJECTIVES.get(name, name)
    known = {"loss": ("per target", _LOSS), "accuracy": ("share", _ACCURACY)}
    unit, description = known.get(kind, ("per target", _METRIC))
    return f"{kind}, {of} ({unit})", description


def layout(objectives: Mapping[str, Objective]) -> dict[str, dict[str, list]]:
    """Returns the custom layout for a run with these objectives: categories, charts, and the curves of each."""
    figures = {"losses (per target)": [f"loss/{name}" for name in objectives]}
    for name, objective in objectives.items():
        for kind in objective.metrics:
            title = "accuracies (share of targets)" if kind == "accuracy" else f"{kind} (per target)"
            figures.setdefault(title, []).append(f"{kind}/{name}")
    learning = {}
    for title, tags in figures.items():
        learning |= {title: tags, f"held-out {title}": [f"validation/{tag}" for tag in tags]}
    if len(objectives) > 1:
        figures["losses (per target)"].insert(0, "loss/total")
    charts = {
        "Learning": learning,
        "Optimiser": {"learning rate": ["optim/lr"], "gradient norm, before clipping": ["optim/grad_norm"]},
        "Speed": {
            "throughput (language tokens/s)": ["throughput/tokens_per_second"],
            "model FLOPs utilisation (share of the measured matrix rate)": ["throughput/mfu"],
            "waiting for data (share of the step)": ["data/wait_fraction"],
        },
        "Health": {
            "peak memory (GiB)": ["memory/peak_gib"],
            "left out (count so far)": [
                "health/skipped_steps",
                "health/loss_scale_overflows",
                "data/quarantined_shards",
            ],
        },
    }
    return {
        category: {title: ["Multiline", tags] for title, tags in named.items()} for category, named in charts.items()
    }
