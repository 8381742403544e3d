"""Keeps so many questions that each text has each of its answers equally often."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A question that could be asked of a picture, or a statement.

    Attributes:
        text: as asked.
        answer: what is right for this picture.
        place: of the picture.
        kind: of question.
    """

    text: str
    answer: Hashable
    place: int
    kind: str = ""


def balanced(candidates: Iterable[Candidate], answers: dict[str, Sequence[Hashable]]) -> list[Candidate]:
    """Returns the first candidates of each text and answer, equally many for each answer of a text, in their order.

    Args:
        candidates: in any order.
        answers: all that are possible, by the kind of question.
    """
    found: dict[str, dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    candidates = list(candidates)
    for number, candidate in enumerate(candidates):
        found[candidate.text][candidate.answer].append(number)
    kept: list[int] = []
    for by_answer in found.values():
        possible = answers[candidates[next(iter(by_answer.values()))[0]].kind]
        most = min(len(by_answer[answer]) for answer in possible)
        kept += [number for answer in possible for number in by_answer[answer][:most]]
    return [candidates[number] for number in sorted(kept)]
