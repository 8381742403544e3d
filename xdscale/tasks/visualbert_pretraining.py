"""VisualBERT's second phase: masked words, and the task's true or false, on a task's own texts (spec VisualBERT §2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from xdscale.data.feature_source import notes_on_features, started_features
from xdscale.data.held_out import held_out_batches
from xdscale.data.masking import drawn_masks
from xdscale.data.opening import verify_table
from xdscale.data.order import Order, validation_slots
from xdscale.data.task_files import NO_LABEL, Example, Span
from xdscale.data.visual_tasks import named_regions, pieces_of, require_named, tokenise
from xdscale.data.visualbert import compose
from xdscale.errors import XdscaleError
from xdscale.pretrained.language import own_tokenizer
from xdscale.recipes.visualbert.task_schema import VisualBERTTaskRecipe
from xdscale.shards.regions import RegionTable
from xdscale.systems.contract import Data, MicroBatch, Place, Slots
from xdscale.systems.visualbert import VisualBERTSystem, check_inputs
from xdscale.tasks.contract import Task, find_task, open_regions, read_task


class VisualBERTTaskSystem(VisualBERTSystem):
    """Trains VisualBERT on with what a task's training examples say of their images."""

    recipe: VisualBERTTaskRecipe

    def open(self, place: Place) -> Data:
        """Reads the task's files, and finds the regions of its images."""
        recipe, ranks = self.recipe, place.ranks
        task, regions = find_task(recipe.task), open_regions(recipe.data.regions)
        if not task.images:
            raise XdscaleError(f"task = {recipe.task!r}: has no images; expected one that has")
        check_inputs(recipe, regions.width)
        if recipe.run.verify:
            verify_table(regions.table, ranks, on_shard=place.tick)
        data = read_task(task, Path(recipe.data.folder), regions)
        train, held_out = (
            TaskTextCollator(recipe, data.task, examples, regions)
            for examples in (data.train, next(iter(data.dev.values())))
        )
        slots = validation_slots(
            len(held_out), recipe.run.eval_samples, ranks.world_size, ranks.rank, place.micro_batch
        )
        order = Order.of(recipe, place, len(train))
        notes = list(data.notes)
        if recipe.model.images:
            self._regions, start = regions, recipe.model.start
            notes += notes_on_features(started_features(start), regions, f"model.start = {start}")
        return Data(order, train, held_out_batches(held_out, slots), data.fingerprints(), notes=tuple(notes))


class TaskTextCollator:
    """Turns slots into batches as `xdscale.data.visualbert.VisualBERTCollator` does; the sentences are a task's.

    What a sample is depends on what the task asks:
        to answer a question: the question, then its commonest answer if that is on the list;
        to point at a region: a caption, once for all of its phrases;
        to judge a sentence: the sentence, and with `match` on whether it is true;
        to choose: the right choice, or with `match` on each of the choices and whether it is right.
    """

    def __init__(
        self, recipe: VisualBERTTaskRecipe, task: Task, examples: Sequence[Example], regions: RegionTable
    ) -> None:
        """Tokenises the texts.

        Raises:
            XdscaleError: `match` is on, and the task has nothing that is true or false; or named regions are read, and
                it does not say which are.
        """
        self._recipe, self._regions, self._images, self._task = recipe, regions, task.images, task
        self._named = recipe.model.objects == "named"
        if recipe.objectives.match is not None and task.reads != "input":
            raise XdscaleError(
                f"objectives.match: {recipe.task} has nothing that is true or false; write objectives.match=null"
            )
        samples = _samples(task, examples, labelled=recipe.objectives.match is not None)
        numbers: dict[str, int] = {}
        self._texts = [[numbers.setdefault(text, len(numbers)) for text in sample.texts] for sample in samples]
        self._spans = [sample.spans for sample in samples]
        self._examples = [sample.example for sample in samples] if any(self._spans) else []
        self._named_regions = [sample.named for sample in samples]
        if self._named:
            require_named(recipe.task, self._named_regions)
        self._labels = np.array([sample.label for sample in samples], np.int64)
        self._rows = regions.rows([name for sample in samples for name in sample.images]).reshape(-1, task.images)
        tokenizer, self._tokens = own_tokenizer(recipe.model.language.name)
        self._ids, self._begins = tokenise(list(numbers), tokenizer, begins=any(self._spans))

    def __len__(self) -> int:
        return len(self._texts)

    def prefetch(self, step: list[Slots]) -> None:
        """Has the regions of a step fetched."""
        self._regions.prefetch(self._rows[np.concatenate([slots.sample_ids for slots in step])].ravel())

    def draws(self, slots: Slots) -> list[np.ndarray]:
        """Returns masked positions and what is put there, reading nothing: every text counts as the longest."""
        most, on, seed = self._recipe.model.max_text, self._recipe.objectives.mlm, self._recipe.training.seed
        return drawn_masks(most, slots, on, self._tokens, seed=seed, everywhere=True)

    def __call__(self, slots: Slots) -> MicroBatch:
        """Reads and prepares the samples of one micro-batch."""
        samples = slots.sample_ids.tolist()
        regions = self._regions.read(self._rows[slots.sample_ids].ravel())
        if self._examples:  # the task knows which regions its words stand for, and refuses those of another table
            self._task.targets([self._examples[sample] for sample in samples], regions)
        if self._named:
            regions = named_regions(regions, [self._named_regions[sample] for sample in samples])
        labels = None
        if self._recipe.objectives.match is not None:
            labels = np.where(slots.real, self._labels[slots.sample_ids], NO_LABEL)
        texts = [[self._ids[text] for text in self._texts[sample]] for sample in samples]
        counts = np.diff(regions.offsets)[:: self._images]
        aligned = [
            self._aligned(sample, self._named_regions[sample] if self._named else range(count))
            for sample, count in zip(samples, counts.tolist())
        ]
        return compose(
            self._recipe,
            self._tokens,
            slots,
            texts,
            labels,
            regions,
            images=self._images,
            alignments=aligned if any(map(len, aligned)) else None,
            from_front=self._recipe.model.truncation == "second_from_front",
        )

    def _aligned(self, sample: int, regions: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Returns regions, which text names each, and the first and the last word piece of its name there."""
        found = []
        for number, (text, spans) in enumerate(zip(self._texts[sample], self._spans[sample])):
            for span in spans:
                first, last = pieces_of(self._begins[text], span)
                if first is not None and span.region in regions:
                    found.append((regions.index(span.region), number, first, last))
        return found


class _Sample(NamedTuple):
    """Texts, the spans of each, images, 1, 0 or `NO_LABEL`, and of a choice its named regions and its example."""

    texts: tuple[str, ...]
    spans: tuple[tuple[Span, ...], ...]
    images: tuple[str, ...]
    label: int
    named: tuple[int, ...] | None = None
    example: Example | None = None


def _samples(task: Task, examples: Sequence[Example], *, labelled: bool) -> list[_Sample]:
    if task.reads == "region":
        captions = dict.fromkeys((example.texts[0], example.images) for example in examples)
        return [_Sample(texts, (), images, NO_LABEL) for texts, images in captions]
    samples: list[_Sample] = []
    for example in examples:
        known = example.label is not None and example.label != NO_LABEL
        if task.reads == "answer":
            answer = (task.labels[int(example.label)],) if known else ()
            samples.append(_Sample(example.texts[0] + answer, (), example.images, NO_LABEL))
        elif not task.choices:
            samples.append(_Sample(example.texts[0], (), example.images, int(example.label)))
        else:
            for choice, texts in enumerate(example.texts):
                right = choice == example.label
                if labelled or right:
                    spans = example.spans[choice] if example.spans else ()
                    samples.append(_Sample(texts, spans, example.images, int(right), example.named, example))
    return samples
