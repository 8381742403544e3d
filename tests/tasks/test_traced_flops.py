"""FLOPs of batches, traced without values, against what torch counts while the module runs."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order
from xdscale.models.cross_modal import SelectedTokens
from xdscale.models.operations import use_definitions
from xdscale.models.packed_tokens import PackedTokens
from xdscale.padding import clip_layout
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip, XDBERTObjectives
from xdscale.shards.table import Table
from xdscale.systems.contract import open_system, recompute_activations
from xdscale.systems.xdbert import build_adaptation
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import (
    Finetuning,
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
)
from xdscale.training import tracing
from xdscale.training.engine import to_device
from xdscale.training.stored import build_module, save_full_model
from xdscale.training.tracing import TracedFlops, on_meta, trace

OBJECTIVES = ("mlm", "match", "clip_tokens")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def counted(call):
    """What torch counts; the fused attention of the CPU is not among it, its definition is."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return counter.get_total_flops()


def counted_step(module, arrays, objectives):
    """Of forward and backward on the CPU."""
    batch = to_device(arrays, torch.device("cpu"))
    return counted(lambda: sum(terms[0] for name, terms in module(batch).items() if name in objectives).backward())


@pytest.fixture(scope="session")
def micro_batches(wiki_shards):
    """Real micro-batches, of texts of different lengths."""
    table = Table(wiki_shards, "train")
    order = Order(len(table), seed=1, global_batch=8, world_size=1, rank=0, micro_batch=8)
    collate = XDBERTCollator(table, seed=1, objectives=XDBERTObjectives())
    return [collate(order.slots(step)[0]).arrays for step in range(20)]


@pytest.mark.parametrize(
    ("off", "layers"), [((), 2), ((), 1), (("match",), 2), (("clip_tokens",), 1), (("mlm", "match"), 1)]
)
def test_real_texts_of_different_lengths(adaptation_spec, arrays, off, layers):
    """The definitions count every pair of tokens; the trace takes texts of the mean length. The last layer computes
    targets only."""
    assert len(set(arrays["clip_lengths"].sum(1).tolist())) > 1
    objectives = [name for name in OBJECTIVES if name not in off]
    plain, fused = (
        build_module(
            open_system(adaptation_spec(objectives=dict.fromkeys(off), kernels=kernels, layers=layers)), continued=True
        )
        for kernels in ("plain", "fused")
    )
    found = trace(on_meta(fused), arrays, objectives)
    assert found.flops == pytest.approx(counted_step(plain, arrays, objectives), rel=0.01)
    if off == ("match",):  # as FlopCounterMode says of the same pass
        batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in _tensors(arrays).items()}
        module = on_meta(fused)
        assert found.flops == counted(lambda: sum(terms[0] for terms in module(batch).values()).backward())


def _tensors(arrays):
    return to_device(arrays, torch.device("cpu"))


def test_texts_of_equal_length_are_counted_exactly(adaptation_spec, arrays):
    row = {name: np.repeat(arrays[name][:1], 4, 0) for name in ("language_ids", "clip_ids", "clip_lengths")}
    equal = row | clip_layout(row["clip_lengths"], 77)
    step = row["clip_ids"][0].size
    places, targets = np.array([3, 17, 40]), np.array([2, 9])
    equal["masked_lm_positions"] = np.concatenate(
        [places + sample * row["language_ids"].shape[1] for sample in range(4)]
    )
    equal["clip_positions"] = np.concatenate([targets + sample * step for sample in range(4)])
    equal["masked_lm_labels"], equal["clip_labels"] = np.full(12, 7), np.full(8, 7)
    equal["match_labels"] = np.ones(4, np.int64)
    plain, fused = (
        build_module(open_system(adaptation_spec(kernels=kernels)), continued=True) for kernels in ("plain", "fused")
    )
    assert trace(on_meta(fused), equal, OBJECTIVES).flops == counted_step(plain, equal, OBJECTIVES)


def test_fewer_targets_cost_less_and_recomputing_layers_more(adaptation_spec, arrays):
    module = on_meta(build_adaptation(adaptation_spec()))
    fewer = dict(arrays, clip_positions=arrays["clip_positions"][:1], clip_labels=arrays["clip_labels"][:1])
    whole = trace(module, arrays, OBJECTIVES)
    assert trace(module, fewer, OBJECTIVES).flops < whole.flops
    recompute_activations(module)
    assert trace(module, arrays, OBJECTIVES).flops > 1.1 * whole.flops


def test_few_micro_batches_of_a_run_are_traced(adaptation_spec, micro_batches, monkeypatch):
    module = build_adaptation(adaptation_spec())
    truth = [trace(on_meta(module), arrays, OBJECTIVES).flops for arrays in micro_batches]
    calls = []
    monkeypatch.setattr(tracing, "trace", lambda *arguments: calls.append(1) or trace(*arguments))
    flops = TracedFlops(on_meta(module), OBJECTIVES, pytest.fail)
    assert [flops(arrays) for arrays in micro_batches] == pytest.approx(truth, rel=0.01)
    assert max(truth) > 1.02 * min(truth)
    assert len(calls) < 10
    flops(micro_batches[0] | {"match_labels": np.ones(8, np.int64)})
    calls.clear()
    assert [flops(arrays) for arrays in micro_batches[:5]] == pytest.approx(truth[:5], rel=0.01)
    assert calls == []


def test_pictures_of_many_sizes_need_few_traces(monkeypatch):
    """Each sample has one of its own, as VL-BERT's from pixels: what they cost hangs on their sum."""

    class Seer(nn.Module):
        def __init__(self):
            super().__init__()
            self.look = nn.Conv2d(3, 4, 1)

        def forward(self, batch):
            pictures = [batch[f"picture_{sample}"] for sample in range(len(batch["real"]))]
            return {"task": (torch.stack([self.look(picture).mean() for picture in pictures]).sum(),)}

    chance, calls, module = np.random.default_rng(0), [], on_meta(Seer())
    monkeypatch.setattr(tracing, "trace", lambda *arguments: calls.append(1) or trace(*arguments))
    flops = TracedFlops(module, ["task"], pytest.fail)
    for _ in range(30):
        sides = chance.integers(20, 60, (6, 2)).tolist()
        arrays = {"real": np.ones(6, bool)}
        arrays |= {f"picture_{sample}": np.zeros((3, *size), np.float32) for sample, size in enumerate(sides)}
        assert flops(arrays) == pytest.approx(trace(module, arrays, ["task"]).flops, rel=0.01)
    assert len(calls) < 4


def test_an_array_that_some_micro_batches_lack(monkeypatch):
    """As where no word of a few questions names a region."""

    class Sometimes(nn.Linear):
        def forward(self, batch):
            rows = torch.cat([batch["rows"], *([batch["more"]] if "more" in batch else [])])
            return {"task": (super().forward(rows).sum(),)}

    calls, module = [], on_meta(Sometimes(3, 5))
    monkeypatch.setattr(tracing, "trace", lambda *arguments: calls.append(1) or trace(*arguments))
    flops = TracedFlops(module, ["task"], pytest.fail)
    for rows, more in ((4, 0), (4, 2), (4, 0), (4, 3), (4, 6)):
        arrays = {"rows": np.ones((rows, 3), np.float32)} | ({"more": np.ones((more, 3), np.float32)} if more else {})
        assert flops(arrays) == pytest.approx(trace(module, arrays, ["task"]).flops)
    assert len(calls) < 5


def test_a_trace_changes_nothing(adaptation_spec, arrays):
    """No draw of a random generator, no weight, no gradient: training goes on as if it had not been."""
    module = build_adaptation(adaptation_spec(dropout=0.1)).train()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    TracedFlops(on_meta(module), OBJECTIVES, pytest.fail)(arrays)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("subject", ["language", "cross-modal", "clip"])
@pytest.mark.parametrize(("task", "labels"), [("cola", [1, 0, 1, 1]), ("mnli", [2, 0, 1, 0]), ("swag", [3, 1, 0, 2])])
def test_subjects_of_finetuning(adaptation_spec, cassette_model, task_arrays, tmp_path, subject, task, labels):
    def build():
        if subject == "language":
            return build_language_classifier(Language(name=str(cassette_model)), find_task(task), dropout=0.1)
        if subject == "clip":
            spec = Clip(name="clip-tiny.json", weights="random")
            return build_clip_classifier(spec, find_task(task), dropout=0.1)
        return build_cross_modal_classifier(tmp_path, find_task(task), dropout=0.1)

    if subject == "cross-modal":
        spec = adaptation_spec()
        save_full_model(spec, build_adaptation(spec).state_dict(), tmp_path / "cross_modal")
        (tmp_path / "config.json").write_bytes((cassette_model / "config.json").read_bytes())
    arrays = task_arrays(task, labels)
    module = Finetuning(build(), find_task(task)).train()
    found = TracedFlops(on_meta(module), ["task"], pytest.fail)(arrays)
    expected = counted_step(use_definitions(module), arrays, ["task"])
    assert found == pytest.approx(expected, rel=0.01)
    assert TracedFlops(on_meta(module), ["task"], pytest.fail)(arrays) == pytest.approx(expected, rel=0.01)


def offsets(lengths):
    """On the CPU, where the definition of attention reads them, beside states without memory."""
    return PackedTokens(torch.tensor([0, *lengths]).cumsum(0), max(lengths))


def run_parts(module):
    """One forward pass on the published arrays, part by part, on the meta device."""
    language, size = module.model.language, module.model.language.config.hidden_size
    language.set_attn_implementation("eager")  # ours reads the offsets' values, of which this device has none
    language(torch.zeros(2, 512, dtype=torch.int64, device="meta"))
    module.model.clip(torch.zeros(1, 9 + 5, 77, dtype=torch.int64, device="meta"))
    rows, columns = 76 + 50 + 2, 120
    states = torch.empty(1024, size, device="meta"), torch.empty(693 + 328, 512, device="meta")
    streams = offsets([512, 512]), offsets([693, 328])
    selected = SelectedTokens(
        torch.empty(rows, dtype=torch.int64, device="meta"),
        offsets([77, 51]),
        torch.empty(columns, dtype=torch.int64, device="meta"),
        offsets([60, 60]),
    )
    for layer, limit in zip(module.model.layers, (None, selected), strict=True):
        states = layer(*states, *streams, limit)
    assert [len(side) for side in states] == [rows, columns]
    labels = torch.empty(1024, dtype=torch.int64, device="meta")
    module.mlm(states[0][:126], labels[:126])
    module.match(states[0][126:], labels[:2])
    module.clip_tokens(states[1], labels[:columns])


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/electra-large-discriminator"])
def test_published_sizes(adaptation_spec, name):
    """BERT-base and ELECTRA-large with ViT-B/32's text tower, texts of 9 full blocks and of 5, part by part."""
    generator = np.random.default_rng(0)
    masked = np.sort(generator.choice(np.arange(1, 511), 76, replace=False))
    tokens = np.sort(generator.choice(np.arange(1, 76), 30, replace=False))
    clip_lengths = np.array([[77] * 9, [77] * 4 + [20] + [0] * 4])
    arrays = {
        "language_ids": np.zeros((2, 512), np.int64),
        "clip_ids": np.zeros((2, 9, 77), np.int64),
        "clip_lengths": clip_lengths,
        **clip_layout(clip_lengths, 77),
        "masked_lm_positions": np.concatenate([masked, 512 + masked[:50]]),
        "masked_lm_labels": np.zeros(126, np.int64),
        "clip_positions": np.concatenate([tokens + 77 * block for block in (0, 4, 9, 12)]),
        "clip_labels": np.zeros(120, np.int64),
        "match_labels": np.ones(2, np.int64),
    }
    with torch.device("meta"):
        plain, fused = (
            build_module(
                open_system(adaptation_spec(name, "ViT-B-32", weights="random", kernels=kernels)), continued=True
            )
            for kernels in ("plain", "fused")
        )
    with torch.no_grad():
        total = counted(lambda: run_parts(plain.eval()))
    assert trace(fused, arrays, OBJECTIVES).flops == pytest.approx(3 * total, rel=0.01)


def test_a_module_that_needs_values_is_left_out_and_told_once():
    class Choosy(torch.nn.Linear):
        def forward(self, batch):
            rows = batch["rows"].float()
            return {"task": (super().forward(rows[rows[:, 0] > 0]).sum(),)}

    said = []
    flops = TracedFlops(on_meta(Choosy(2, 2)), ["task"], said.append)
    assert [np.isnan(flops({"rows": np.ones((3, 2))})) for _ in range(2)] == [True, True]
    (line,) = said
    assert line.startswith("throughput/mfu is left out: the module cannot run without values: ")
    for module, arrays in ((TypeError("cannot pickle a lock"), {"rows": np.ones((3, 2))}), (Choosy(2, 2), {})):
        assert np.isnan(TracedFlops(module, ["task"], said.append)(arrays))
    assert "cannot run without values: cannot pickle a lock" in said[1]
