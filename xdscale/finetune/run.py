"""Finetuning as a system: one run is one model, one task, one seed."""

import json
import shutil
import time
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from xdscale.data.feature_source import keep_feature_source, kept_feature_source, state_feature_source
from xdscale.data.held_out import held_out_batches
from xdscale.data.opening import verify_table
from xdscale.data.order import Order, validation_slots
from xdscale.data.task_batches import CLIP_BLOCKS
from xdscale.ds_config import precision
from xdscale.errors import EXIT_STOPPED, XdscaleError
from xdscale.export import export_run
from xdscale.files import write_atomically
from xdscale.finetune.notes import notes_on, notes_on_words
from xdscale.finetune.predictions import Predicted, predict, write_predictions, write_submission
from xdscale.finetune.recipe import FORMAT, MODEL, RESULT, FinetuneRecipe, SubjectSection, TaskFiles, TaskSection
from xdscale.recipes.finetune.schema import ModelSettings
from xdscale.systems.contract import Data, ExampleCollator, Objective, Place, System
from xdscale.tasks.contract import Subject, TaskData, find_settings, find_subject, open_regions, read_task
from xdscale.tasks.finetuning import Finetuning
from xdscale.tasks.metrics import METRICS
from xdscale.training.best import final_step
from xdscale.training.checkpoint_folder import list_checkpoints, step_of
from xdscale.training.run_folder import read_log
from xdscale.training.session import Setup
from xdscale.weights import part_of


class Material(NamedTuple):
    """What the runs of one task share: its splits, and what reads them."""

    data: TaskData
    subject: Subject
    train: ExampleCollator
    dev: dict[str, ExampleCollator]
    test: dict[str, ExampleCollator]


class FinetuneSystem(System):
    """Finetunes a model on a task and predicts its splits."""

    recipe: FinetuneRecipe

    def __init__(self, recipe: FinetuneRecipe) -> None:
        super().__init__(recipe)
        self._began = time.monotonic()

    @property
    def _subject(self) -> Subject:
        model = self.recipe.model
        return find_subject(model.subject)(model.name, model)

    @property
    def _material(self) -> Material:
        recipe = self.recipe
        seed = recipe.training.seed if recipe.model.draws else None  # else all seeds share what is read
        return prepare(recipe.task, recipe.data, recipe.model, seed)

    @property
    def _keeps(self) -> bool | str:
        """What `run.keep_model` says; False where nobody asked for a model of a kind that is not exported."""
        keep = self.recipe.run.keep_model
        return keep if keep is True or find_subject(self.recipe.model.subject).exports() else False

    def objectives(self) -> dict[str, Objective]:
        """Returns the task's loss, and what else the subject learns."""
        return {"task": Objective(1.0)} | self._subject.objectives()

    def open(self, place: Place) -> Data:
        """Reads and tokenises the task's files.

        Raises:
            XdscaleError: the run is finished, shards of the regions are damaged, outlines of objects cannot be read,
                or as `prepare`.
        """
        result = Path(self.recipe.output.folder) / RESULT
        if result.is_file():
            raise XdscaleError(
                f"{result}: this run is finished; to run it again, delete its folder or choose another one"
            )
        regions, ranks = open_regions(self.recipe.data.regions), place.ranks
        if regions is not None and self.recipe.run.verify:
            verify_table(regions.table, ranks, on_shard=place.tick)
        material = self._material
        order = Order.of(self.recipe, place, len(material.train))
        dev = next(iter(material.dev.values()))
        slots = validation_slots(
            len(dev), self.recipe.run.eval_samples, ranks.world_size, ranks.rank, place.micro_batch
        )
        notes = (
            *material.data.notes,
            *material.subject.notes(),
            *notes_on(material.data),
            *notes_on_words(material.data, material.subject.tokenizer()),
            *_notes_on_length(material, self.recipe.model.max_length),
        )
        fingerprints = material.data.fingerprints()
        if material.subject.reads_outlines():
            task, splits = material.data.task, material.data.dev | material.data.test
            seen = list(chain(material.data.train, *splits.values()))
            fingerprints["outlines of objects"] = task.outlines_sha256(seen)
            notes = (*notes, *task.outline_notes(seen))
        return Data(order, material.train, held_out_batches(dev, slots), fingerprints, notes=notes)

    def build(self) -> Finetuning:
        """Builds the subject with the task's loss."""
        material, sha256 = self._material, self.recipe.model.weights_sha256
        module = Finetuning(material.subject.build(material.data.task, sha256=sha256), material.data.task)
        if self.recipe.model.freeze_pooler:
            freeze_pooler(module)
        return module

    def parts(self, module: Finetuning) -> dict[str, nn.Module]:
        """Returns the encoder, what computes features from pixels if it does, and the head: what there is besides."""
        trunk = getattr(module.subject, "trunk", None)
        more = {} if trunk is None else {"trunk": trunk}
        return {"encoder": module.subject.encoder, **more, "head": module.subject}

    def keep(self, folder: Path) -> None:
        """Keeps what computed the features, where some are read."""
        if not self.recipe.model.reads_pixels:
            keep_feature_source(open_regions(self.recipe.data.regions), folder)

    def export(self, state: dict[str, torch.Tensor], run: Path, out: Path) -> str:
        """Writes the finetuned model as its subject does, which says what features it was trained on before."""
        said = self._subject.export(self.recipe.task.find(), part_of(state, "subject."), out)
        source = kept_feature_source(run)
        if source is not None or self.recipe.model.reads_pixels:
            state_feature_source(source, out)
        return said

    def finish(self, setup: Setup, engine: Any) -> int:
        """Predicts every example of the development and test splits once, and writes the result."""
        recipe, ranks, material = self.recipe, setup.ranks, self._material
        task, predicted = material.data.task, {}
        micro_batch = setup.ds_config["train_micro_batch_size_per_gpu"]
        for split, collate in (material.dev | material.test).items():
            setup.watchdog.enter("prediction", recipe.training.steps)
            slots = validation_slots(len(collate), len(collate), ranks.world_size, ranks.rank, micro_batch)
            predicted[split] = predict(setup, task, engine, split, slots, collate)
            if predicted[split] is None:
                return EXIT_STOPPED
        if self._keeps:
            setup.watchdog.enter("saving", recipe.training.steps)
        if ranks.is_first:
            self._write(setup, predicted)
        return 0

    def _write(self, setup: Setup, predicted: dict[str, Predicted]) -> None:
        material, folder = self._material, setup.run.folder
        task = material.data.task
        for split, examples in material.data.dev.items():
            write_predictions(folder / f"predictions-{split}.jsonl", task, examples, predicted[split])
        for name, examples in material.data.test.items():
            write_submission(folder / "predictions" / name, task, examples, predicted[name])
        if self._keeps:
            shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a start that was killed
            step = final_step(folder, self.recipe) or step_of(list_checkpoints(setup.run.checkpoints)[-1])
            export_run(folder, folder / MODEL, step=step)  # of a step that is named no other rank is asked
        result = _result(setup, material, predicted)
        result |= {"kept_model": self._keeps, "seconds": time.monotonic() - self._began}
        write_atomically(folder / RESULT, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(setup.run.checkpoints, ignore_errors=True)  # the result says it all, and a sweep has many


def freeze_pooler(module: Finetuning) -> None:
    """Leaves what is called "pooler" in a model as it is.

    Raises:
        XdscaleError: it has none.
    """
    poolers = [parameter for name, parameter in module.named_parameters() if "pooler" in name]
    if not poolers:
        raise XdscaleError("model.freeze_pooler = true: this model has no pooler; leave it out")
    for parameter in poolers:
        parameter.requires_grad_(False)


@lru_cache(maxsize=1)
def prepare(section: TaskSection, files: TaskFiles, model: SubjectSection, seed: int | None) -> Material:
    """Reads and tokenises a task, once for all its seeds in this process where nothing of it depends on these.

    Raises:
        XdscaleError: the task's files or the model's tokenizer are not in order.
    """
    regions = open_regions(files.regions)
    read = read_task(section.find(), Path(files.folder), regions)
    subject = find_subject(model.subject)(model.name, model, regions)
    return Material(
        read,
        subject,
        subject.training_collator(read.task, read.train, seed),  # which knows what was found in the files
        {split: subject.collator(read.task, examples) for split, examples in read.dev.items()},
        {split: subject.collator(read.task, examples) for split, examples in read.test.items()},
    )


def _result(setup: Setup, material: Material, predicted: dict[str, Predicted]) -> dict[str, Any]:
    recipe, task = setup.recipe, material.data.task
    better = METRICS[task.score].higher_is_better
    metrics, (headline, *rest) = {}, material.dev
    for split in (headline, *rest):
        measured = task.measure(predicted[split].values, material.data.dev[split])
        metrics |= measured if split == headline else {f"{name}_{split}": value for name, value in measured.items()}
    log = read_log(setup.run.log)
    curve = [entry for entry in log if entry["kind"] == "step"]
    return {
        "format": FORMAT,
        "task": task.name,
        "title": task.title,
        "subject": recipe.model.subject,
        "label": recipe.run.label,
        "seed": recipe.training.seed,
        "split": headline,
        "metrics": metrics,
        "score": {"name": task.score, "value": metrics[task.score], "higher_is_better": better},
        "examples": len(material.dev[headline]),
        "data": material.data.files,
        "model": recipe.model.model_dump(include={"weights_sha256"} | recipe.model.of_model),
        "settings": _settings(recipe, setup.ds_config),
        "curve": [{"step": entry["step"], "loss": entry["loss/total"]} for entry in curve],
        "best_step": final_step(setup.run.folder, recipe),
    }


def _settings(recipe: FinetuneRecipe, ds_config: dict[str, Any]) -> dict[str, Any]:
    """Returns what must be equal for two models' results to be comparable."""
    optim, subject = recipe.optim.model_dump(mode="json"), find_settings(recipe.model.subject)
    own = subject.model_fields.keys() - ModelSettings.model_fields.keys() - subject.of_model
    return {
        "format": FORMAT,
        **optim,
        "epochs": recipe.task.epochs,
        "steps": recipe.training.steps,
        "global_batch": recipe.training.global_batch,
        "max_length": recipe.model.max_length,
        "clip_blocks_per_sentence": CLIP_BLOCKS,
        "dropout": recipe.model.dropout,
        **({"freeze_pooler": True} if recipe.model.freeze_pooler else {}),
        **recipe.model.model_dump(mode="json", include=own, exclude_defaults=True),
        "precision": precision(ds_config),
        **recipe.training.model_dump(include={"best", "patience"}, exclude_none=True),
        **({} if recipe.task.own is None else recipe.task.own.columns()),
    }


def _notes_on_length(material: Material, max_length: int) -> list[str]:
    """Returns one line for each file that has examples longer than the model reads."""
    notes = []
    texts = {"train": material.data.train, **material.data.dev, **material.data.test}
    for split, collate in {"train": material.train, **material.dev, **material.test}.items():
        count, first = collate.first_cut()
        if count:
            notes.append(
                f"{material.data.sources[split]}: {count} of {len(collate)} examples have more than {max_length} "
                f"tokens and are cut, the first in line {texts[split][first].line}"
            )
    return notes
