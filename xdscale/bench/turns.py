"""Whole training steps of two computations of the same loss, in turns: what a step bench measures and prints.

The learning rate is 0, so that every step starts from the same weights while the update costs what it always costs.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.table import Table
from torch import nn

from xdscale.bench.step import activation_bytes, update_masters
from xdscale.bench.step_report import spread
from xdscale.shards.regions import Regions
from xdscale.training.throughput import wait

OURS, OURS_AUTOCAST, OURS_MASTERS = "xdscale, fp32", "xdscale, autocast", "xdscale, bf16 with fp32 masters"

Loss = Callable[[nn.Module], torch.Tensor]


@dataclass
class Contestant:
    """One way to compute a step.

    Attributes:
        module: with the fp32 weights.
        loss: computes it with a module, which is this one or its copy in bf16.
        fused: whether AdamW is PyTorch's fused one, or its default, as a user takes it.
        seconds: of each step that was measured.
        peak: memory of forward and backward above weights and gradients, in bytes.
    """

    module: nn.Module
    loss: Loss
    fused: bool
    autocast: bool = False
    masters: bool = False
    seconds: list[float] = field(default_factory=list)
    peak: int = 0

    def __post_init__(self) -> None:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.device = trained[0].device
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, fused=self.fused or None)
        self.computing = copy.deepcopy(self.module).to(torch.bfloat16) if self.masters else self.module
        self._gradients = [torch.empty_like(p, requires_grad=False) for p in self.module.parameters()] * self.masters

    def step(self) -> None:
        """Makes a step and keeps its time."""
        wait(self.device)
        began = time.perf_counter()
        self._forward_backward()
        if self.masters:
            update_masters(self.optimizer, self.module, self.computing, self._gradients)
        else:
            self.optimizer.step()
        wait(self.device)
        self.seconds.append(time.perf_counter() - began)

    def measure_memory(self) -> None:
        """Finds the peak of a step, and warms caches."""
        for module in (self.module, self.computing):  # freeing what others left would count as memory gained
            module.zero_grad(set_to_none=True)
        self.peak = activation_bytes(self._forward_backward, self.computing.parameters())

    def _forward_backward(self) -> None:
        torch.manual_seed(0)
        for module in (self.module, self.computing):
            module.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.loss(self.computing)
        loss.backward()


@dataclass
class Case:
    """A step that both compute.

    Attributes:
        name: in words, with its shape.
        disagreement: relative difference of the two losses in fp32, without dropout.
        contestants: by name.
    """

    name: str
    disagreement: float
    contestants: dict[str, Contestant]

    @property
    def reference(self) -> Contestant:
        """The first one: what the others are measured against."""
        return next(iter(self.contestants.values()))

    def measure(self, pairs: int) -> None:
        """Finds the memory of each contestant's step, then lets them step in turns, so many times each."""
        for contestant in self.contestants.values():
            contestant.measure_memory()
        for _ in range(pairs):
            for contestant in self.contestants.values():
                contestant.step()

    def ratio(self, faster: str, slower: str) -> list[float]:
        """Returns how many times as fast one was as the other, turn by turn."""
        pairs = zip(self.contestants[slower].seconds, self.contestants[faster].seconds)
        return [one / other for one, other in pairs]


def contest(
    name: str, modules: tuple[nn.Module, nn.Module], losses: tuple[Loss, Loss], against: str, narrow: bool
) -> Case:
    """Returns a case: what it is measured against in fp32 and autocast, and ours in these and in bf16.

    Args:
        name: of the case.
        modules: ours and the other one, with the same weights.
        losses: compute the same loss with each, or with a copy of it.
        against: what the other one is called.
        narrow: whether bf16 is worth measuring.
    """
    (ours, theirs), (our_loss, their_loss) = modules, losses
    with _evaluating(ours, theirs), torch.no_grad():
        disagreement = abs(our_loss(ours) / their_loss(theirs) - 1).item()
    contestants = {f"{against}, fp32": Contestant(theirs, their_loss, False), OURS: Contestant(ours, our_loss, True)}
    if narrow:
        contestants[f"{against}, autocast"] = Contestant(theirs, their_loss, False, autocast=True)
        contestants[OURS_AUTOCAST] = Contestant(ours, our_loss, True, autocast=True)
        contestants[OURS_MASTERS] = Contestant(ours, our_loss, True, masters=True)
    return Case(name, disagreement, contestants)


def take_weights(theirs: nn.Module, state: dict[str, torch.Tensor], tied: set[str]) -> None:
    """Gives the other computation our weights; they are all that it has, but for those that it ties."""
    found = theirs.load_state_dict(state, strict=False)
    if found.unexpected_keys or {*found.missing_keys} - tied:
        raise ValueError(f"not the same parameters: {found}")
    theirs.train()


def case_table(case: Case) -> Table:
    """Returns the table of a case, a line for each contestant."""
    reference = next(iter(case.contestants))
    caption = f"against {reference}; its loss and ours differ by {case.disagreement:.0e}, without dropout"
    table = Table(title=case.name, caption=caption)
    for heading in ("", "seconds", "times as fast", "activations, MiB", "share"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, contestant in case.contestants.items():
        share = f"{contestant.peak / case.reference.peak:.2f}"
        faster = spread(case.ratio(name, reference))
        table.add_row(name, spread(contestant.seconds), faster, f"{contestant.peak / 2**20:,.0f}", share)
    return table


def drawn_words(chance: np.random.Generator, lengths: tuple[int, int]) -> np.ndarray:
    """Draws a text of at least and at most so many ids."""
    return chance.integers(1000, 1200, chance.integers(lengths[0], lengths[1] + 1))


def drawn_regions(chance: np.random.Generator, samples: int, fewest: int, most: int, width: int) -> Regions:
    """Draws for each sample between so few and so many regions, whose features are so wide; images are of one pixel."""
    counts = chance.integers(fewest, most + 1, samples)
    corners = np.sort(chance.random((counts.sum(), 2, 2), np.float32), axis=1)
    boxes = corners.reshape(-1, 4)
    features = chance.standard_normal((len(boxes), width), np.float32).astype(np.float16)
    sizes = np.ones((samples, 2), np.uint16)
    return Regions(features, boxes, boxes[:, 0], sizes, np.concatenate([[0], np.cumsum(counts)]))


@contextmanager
def _evaluating(*modules: nn.Module) -> Iterator[None]:
    for module in modules:
        module.eval()
    yield
    for module in modules:
        module.train()
