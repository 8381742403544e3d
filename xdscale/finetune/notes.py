"""What a person should know of a task's examples before hours of training: mistakes that no line of a file is."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer

from xdscale.data.task_files import Example
from xdscale.recipe import shipped_settings
from xdscale.shards.language import notes_on_unknown
from xdscale.tasks.contract import TaskData

_FEW = 0.05
"""Share of a development split that may be trained on unsaid, as of published tasks."""
_LOOKED_AT = 1000
"""Examples whose texts are looked at for unknown words."""


def notes_on(data: TaskData) -> list[str]:
    """Returns a line for each split with empty texts, with an id twice, without a class, or that is trained on too."""
    labelled = {"train": data.train, **data.dev}
    notes = [*_of_empty_texts(data, labelled | data.test), *_of_ids(data, data.dev | data.test)]
    for split, examples in labelled.items():
        if missing := _missing_labels(data, examples):
            notes.append(f"{data.sources[split]}: none of {len(examples):,} examples is of the class {missing}")
    known = {_content(example) for example in data.train}
    for split, examples in data.dev.items():
        shared = [example for example in examples if _content(example) in known]
        if len(shared) > _FEW * len(examples):
            notes.append(
                f"{data.sources[split]}: {len(shared):,} of {len(examples):,} examples are trained on, since they "
                f"stand in {data.sources['train']} too, the first in line {shared[0].line}; they say little of others"
            )
    return notes


def notes_on_words(data: TaskData, tokenizer: Tokenizer | None) -> list[str]:
    """Returns a line where much of the training texts is unknown to a tokenizer: of another language, say."""
    if tokenizer is None:
        return []
    texts = dict.fromkeys(text for one in data.train[:_LOOKED_AT] for texts in one.texts for text in texts)
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    pieces = np.fromiter(chain.from_iterable(one.ids for one in encoded), np.int64)
    return notes_on_unknown(data.sources["train"], pieces, tokenizer)


def notes_on_recipe(recipe: str, kind: str) -> list[str]:
    """Returns a line where a recipe ships for other kinds of subject, and there are some for this one.

    Args:
        recipe: as it was named.
        kind: of subject.
    """
    shipped = [path.stem for path in shipped_settings()]
    fitting = [name for name in shipped if name.startswith(f"{kind}-")]
    if not fitting or recipe not in shipped or recipe.startswith((f"{kind}-", "quickstart")):
        return []
    return [f"note: --recipe {recipe} is not how a {kind} was finetuned as published: {', '.join(fitting)} are"]


def _of_empty_texts(data: TaskData, splits: dict[str, list[Example]]) -> list[str]:
    notes = []
    for split, examples in splits.items():
        empty = [one for one in examples if not all(text.strip() for texts in one.texts for text in texts)]
        if empty:
            notes.append(
                f"{data.sources[split]}: {len(empty):,} of {len(examples):,} examples have an empty text, the first in "
                f"line {empty[0].line}"
            )
    return notes


def _missing_labels(data: TaskData, examples: Sequence[Example]) -> str:
    """Returns names of classes that no example is of; answers are too many to be all there, choices are no classes."""
    labels = getattr(data.task, "labels", ())
    if data.task.reads != "input" or data.task.choices or not labels:
        return ""
    there = {example.label for example in examples}
    missing = [name for number, name in enumerate(labels) if number not in there]
    return ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")


def _of_ids(data: TaskData, splits: dict[str, list[Example]]) -> list[str]:
    """Returns a line for each split in which one name stands for several examples, where predictions name them so."""
    notes = []
    for split, examples in splits.items() if getattr(data.task, "predicts_by_id", False) else ():
        for name, count in Counter(example.id for example in examples).most_common(1):
            if count > 1:
                told = f"{count:,} examples have the {data.task.id} {name!r}, by which predictions name them"
                notes.append(f"{data.sources[split]}: {told}")
    return notes


def _content(example: Example) -> int:
    return hash((example.texts, example.images))
