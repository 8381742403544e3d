"""One finetuning run: one model, one task, one seed, on the loop, the engine and the checkpoints of adaptation."""

import json
import shutil
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from xdscale.data.order import Order, sample_hash, validation_slots
from xdscale.data.task_batches import CLIP_BLOCKS, EncodedSplit, TaskCollator, encode_examples
from xdscale.ds_config import precision
from xdscale.errors import EXIT_STOPPED
from xdscale.files import write_atomically
from xdscale.finetune.predictions import Predicted, predict, write_predictions, write_submission
from xdscale.finetune.recipe import FORMAT, RESULT, FinetuneRecipe, TaskSection
from xdscale.finetune.subject import Readers, build_subject, open_readers
from xdscale.tasks.contract import TaskData
from xdscale.tasks.metrics import METRICS
from xdscale.training.distributed import Ranks
from xdscale.training.protocols import StepData
from xdscale.training.run_folder import RunFolder, read_log
from xdscale.training.session import RunData, Setup, open_session, train_session
from xdscale.training.signals import StopRequest
from xdscale.training.watchdog import Watchdog


class Material(NamedTuple):
    """What the runs of one task share."""

    data: TaskData
    readers: Readers
    train: EncodedSplit
    dev: dict[str, EncodedSplit]
    test: dict[str, EncodedSplit]


def finetune(
    recipe: FinetuneRecipe,
    ds_config: dict[str, Any],
    label: str,
    ranks: Ranks,
    stop: StopRequest,
    say: Callable[[str], None],
) -> int:
    """Trains, predicts, and writes the result.

    Args:
        recipe: of the run.
        ds_config: resolved DeepSpeed configuration.
        label: the model's name in tables.
        ranks: this process among the others.
        stop: catches the signals.
        say: gets what a person should know of the data.

    Returns:
        The exit code: 0 with a result, 75 after a signal with a checkpoint, else the failure's, said on stderr.
    """
    began = time.monotonic()
    run = RunFolder(Path(recipe.output.folder))
    with Watchdog(ranks, run.folder, recipe.training.hang_seconds) as watchdog:
        setup = Setup(recipe, ds_config, run, ranks, stop, watchdog)
        try:
            ranks.on_first(lambda: run.check(recipe))
            ranks.on_first(run.claim)
            material = prepare(recipe.task, recipe.model.name, recipe.model.subject)
            for note in _notes_on_length(material, recipe.model.max_length):
                say(note)
            data = _open_data(setup, material)
            session = open_session(setup, data, lambda continued: build_subject(recipe, material.data.task))
            code = train_session(setup, data, session, {"task": 1.0})
            if code == 0 and not recipe.training.stops_early:
                code = _finish(setup, label, material, session.engine, began)
            watchdog.end()
            session.engine.destroy()
            return code
        except Exception as error:
            return watchdog.report(error, stopping=stop.requested)
        finally:
            run.release()


@lru_cache(maxsize=1)
def prepare(section: TaskSection, model: str, subject: str) -> Material:
    """Reads and tokenises a task, once for all its seeds in this process.

    Raises:
        XdscaleError: the task's files or the model's tokenizer are not in order.
    """
    task = section.find()
    read = task.read(Path(section.data))
    readers = open_readers(model, subject)

    def encode(examples: list) -> EncodedSplit:
        language, clip = (reader[0] if reader else None for reader in readers)
        return encode_examples(examples, task.targets, language, clip)

    return Material(
        read,
        readers,
        encode(read.train),
        {split: encode(examples) for split, examples in read.dev.items()},
        {split: encode(examples) for split, examples in read.test.items()},
    )


def _open_data(setup: Setup, material: Material) -> RunData:
    recipe, ranks = setup.recipe, setup.ranks
    training, micro_batch = recipe.training, setup.ds_config["train_micro_batch_size_per_gpu"]
    order = Order(
        len(material.train),
        seed=training.seed,
        global_batch=training.global_batch,
        world_size=ranks.world_size,
        rank=ranks.rank,
        micro_batch=micro_batch,
    )
    collate = _collator(recipe, material, material.train)
    dev = next(iter(material.dev.values()))
    slots = validation_slots(len(dev), training.eval_samples, ranks.world_size, ranks.rank, micro_batch)
    collate_dev = _collator(recipe, material, dev)

    def prepare_step(step: int) -> StepData:
        return StepData([collate(item) for item in order.slots(step)], stream_hash(step))

    def stream_hash(step: int) -> str:
        return sample_hash(*order.global_batch_ids(step))

    validation = [collate_dev(item) for item in slots]
    return RunData(prepare_step, validation, order, stream_hash, material.data.fingerprint(), {})


def _collator(recipe: FinetuneRecipe, material: Material, split: EncodedSplit) -> TaskCollator:
    language, clip = (reader[1] if reader else None for reader in material.readers)
    return TaskCollator(split, language, clip, max_length=recipe.model.max_length)


def _finish(setup: Setup, label: str, material: Material, engine: Any, began: float) -> int:
    """Predicts every example of the development and test splits once, and writes the result."""
    recipe, run, ranks = setup.recipe, setup.run, setup.ranks
    micro_batch = setup.ds_config["train_micro_batch_size_per_gpu"]
    task, predicted = material.data.task, {}
    for split, encoded in (material.dev | material.test).items():
        setup.watchdog.enter("prediction", recipe.training.steps)
        collate = _collator(recipe, material, encoded)
        slots = validation_slots(len(encoded), len(encoded), ranks.world_size, ranks.rank, micro_batch)
        predicted[split] = predict(setup, task, engine, slots, collate)
        if predicted[split] is None:
            return EXIT_STOPPED
    if ranks.is_first:
        for split, examples in material.data.dev.items():
            write_predictions(run.folder / f"predictions-{split}.jsonl", task, examples, predicted[split])
        for name, examples in material.data.test.items():
            write_submission(run.folder / "predictions" / name, task, examples, predicted[name])
        result = _result(setup, label, material, predicted) | {"seconds": time.monotonic() - began}
        write_atomically(run.folder / RESULT, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(run.checkpoints, ignore_errors=True)  # the result says it all, and a sweep has many
    return 0


def _result(setup: Setup, label: str, material: Material, predicted: dict[str, Predicted]) -> dict[str, Any]:
    recipe, task = setup.recipe, material.data.task
    better = METRICS[task.score].higher_is_better
    metrics, (headline, *rest) = {}, material.dev
    for split in (headline, *rest):
        measured = task.measure(predicted[split].values, material.data.dev[split])
        metrics |= measured if split == headline else {f"{name}_{split}": value for name, value in measured.items()}
    curve = [entry for entry in read_log(setup.run.log) if entry["kind"] == "step"]
    return {
        "format": FORMAT,
        "task": task.name,
        "title": task.title,
        "subject": recipe.model.subject,
        "label": label,
        "seed": recipe.training.seed,
        "split": headline,
        "metrics": metrics,
        "score": {"name": task.score, "value": metrics[task.score], "higher_is_better": better},
        "examples": len(material.dev[headline]),
        "data": material.data.files,
        "settings": _settings(recipe, setup.ds_config),
        "curve": [{"step": entry["step"], "loss": entry["loss/total"]} for entry in curve],
    }


def _settings(recipe: FinetuneRecipe, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal for two models' results to be comparable."""
    optim = recipe.optim.model_dump(mode="json")
    return {
        "format": FORMAT,
        **optim,
        "epochs": recipe.task.epochs,
        "steps": recipe.training.steps,
        "global_batch": recipe.training.global_batch,
        "max_length": recipe.model.max_length,
        "clip_blocks_per_sentence": CLIP_BLOCKS,
        "dropout": recipe.model.dropout,
        "precision": precision(ds_config),
        **({} if recipe.task.own is None else recipe.task.own.columns()),
    }


def _notes_on_length(material: Material, max_length: int) -> list[str]:
    """Returns one line for each file that has examples longer than the model reads."""
    notes = []
    texts = {"train": material.data.train, **material.data.dev, **material.data.test}
    for split, encoded in {"train": material.train, **material.dev, **material.test}.items():
        count, first = encoded.first_cut(max_length)
        if count:
            notes.append(
                f"{material.data.sources[split]}: {count} of {len(encoded)} examples have more than {max_length} "
                f"tokens and are cut, the first in line {texts[split][first].line}"
            )
    return notes
