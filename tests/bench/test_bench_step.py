import json
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xdscale.bench import plain_model, xdbert_step
from xdscale.bench.step import activation_bytes, bench_step
from xdscale.bench.step_report import FAST, PARTS, PLAIN, Measured, StepReport, step_table
from xdscale.bench.xdbert_step import measure_step
from xdscale.data.collate import XDBERTCollator
from xdscale.data.order import Order
from xdscale.errors import XdscaleError
from xdscale.recipe import load_recipe
from xdscale.recipes.xdbert.schema import XDBERTRecipe
from xdscale.shards.table import Table
from xdscale.systems.contract import MicroBatch
from xdscale.systems.xdbert import build_adaptation
from xdscale.training.engine import to_device


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe_of(language, clip, shards):
    return XDBERTRecipe(
        system="xdbert",
        model={
            "language": {"name": str(language)},
            "clip": {"name": str(clip), "weights": "random"},
            "cross_layers": 2,
        },
        data={"shards": str(shards)},
        training={"steps": 1, "global_batch": 2},
        output={"folder": "unused"},
    )


@pytest.fixture(scope="module")
def real_recipe(cassette_model, clip_tiny, wiki_shards):
    return recipe_of(cassette_model, clip_tiny, wiki_shards)


@pytest.fixture
def tiny_recipe(tmp_path):
    """A vocabulary of 1,200 for both, and no shards."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 1200, **shape}))
    text = {"vocab_size": 1200, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "clip.json").write_text(json.dumps({"embed_dim": 32, "quick_gelu": True, "text_cfg": text}))
    return recipe_of(tmp_path / "bert", tmp_path / "clip.json", tmp_path / "no shards")


@pytest.fixture(scope="module")
def real(real_recipe):
    """The real small BERT; CLIP's positions are drawn larger, so that a shifted position would be noticed."""
    torch.manual_seed(0)
    module = build_adaptation(real_recipe).eval()
    torch.nn.init.normal_(module.model.clip.tower.positional_embedding, std=0.3)
    return module


@pytest.fixture(scope="module")
def arrays(real_recipe, wiki_shards):
    """Two real sequences and a third that only pads the micro-batch."""
    split = Table(wiki_shards, "train")
    order = Order(len(split), seed=3, global_batch=2, world_size=1, rank=0, micro_batch=3)
    return XDBERTCollator(split, seed=3, objectives=real_recipe.objectives)(order.slots(0)[0]).arrays


@pytest.fixture
def batch(arrays):
    return to_device(arrays, torch.device("cpu"))


@pytest.fixture
def known_rate(monkeypatch):
    """Saves the seconds of measuring the matrix rate."""
    monkeypatch.setattr("xdscale.bench.step.matmul_flops_per_second", lambda device, dtype: 1e12)


def gradients(module, losses):
    module.zero_grad(set_to_none=True)
    torch.stack(losses).sum().backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_both_paths_have_the_same_losses_and_gradients(real, batch):
    """Issue 3: within 1e-5 in fp32, without dropout. Padding, ignored labels and skipped rows change nothing."""
    plain = plain_model.plain_losses(real, batch, dropout=0.0)
    expected = gradients(real, list(plain.values()))
    fast = {name: terms[0] for name, terms in real(batch).items()}
    found = gradients(real, list(fast.values()))
    assert {name: loss.item() for name, loss in fast.items()} == pytest.approx(
        {name: loss.item() for name, loss in plain.items()}, rel=1e-5
    )
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for name, gradient in found.items():
        # A key's bias shifts all scores of a row alike, so its true gradient is 0 and only rounding is left of it.
        scale = expected[name.replace("key.bias", "key.weight")].norm()
        assert (gradient - expected[name]).norm() <= 1e-5 * scale, name


def test_flops_are_those_of_the_products_that_run(real, real_recipe, arrays, batch):
    """As torch counts them while the step of the released code runs; the fast one needs less than half."""
    with FlopCounterMode(display=False) as counter:
        gradients(real, list(plain_model.plain_losses(real, batch, dropout=0.0).values()))
    bench = xdbert_step._Bench(real, real_recipe, MicroBatch(arrays, Counter(), 0))
    assert bench.flops(PLAIN) == counter.get_total_flops() > 2 * bench.flops(FAST) > 0


def test_encoders_are_those_of_the_libraries(real, batch):
    """The plain encoders against transformers' eager BERT and open_clip's own forward."""
    language, tower = real.model.language, real.model.clip.tower
    used = language.config._attn_implementation
    language.set_attn_implementation("eager")
    with torch.no_grad():
        expected = language(input_ids=batch["language_ids"]).last_hidden_state
        language.set_attn_implementation(used)
        found = plain_model.language_states(language, batch["language_ids"], 0.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        expected = tower(batch["clip_ids"].flatten(0, 1)).reshape(3, -1, 128)
        found = plain_model.clip_states(real.model.clip, batch["clip_ids"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_is_everywhere_in_the_language_encoder(real, batch):
    encoder, ids = real.model.language, batch["language_ids"]
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = (plain_model.language_states(encoder, ids, 0.0) for _ in range(2))
        dropped = plain_model.language_states(encoder, ids, 0.1)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (dropped - first).abs().amax(-1).min() > 1e-3


def test_activation_memory_counts_what_is_saved_and_leaves_gradients_out():
    weight = torch.nn.Parameter(torch.ones(1 << 20))
    states = torch.ones(1 << 20)  # 4 MiB each

    def run():
        ((weight * states).exp().sin().sum()).backward()

    # At the peak: exp's result, which sine and the backward of exp read, sine's, and the gradient on its way.
    peak = activation_bytes(run, [weight])
    assert 12 << 20 <= peak < 20 << 20
    kept = []
    weight.grad = None
    assert activation_bytes(lambda: kept.append(torch.ones(1 << 20)), [weight]) == pytest.approx(4 << 20, rel=1e-3)


def test_step_is_measured_and_split(tiny_recipe, capsys):
    report = measure_step(tiny_recipe, against="plain", pairs=2, sequences=2)
    assert list(report.paths)[:2] == [PLAIN, FAST]
    assert report.disagreement < 1e-5
    for name, path in report.paths.items():
        assert len(path.seconds) == len(path.cpu_seconds) == len(report.ratios(name)) == 2
        for seconds, parts in zip(path.seconds, path.parts):
            assert {part for part, _ in parts} == set(PARTS)
            assert all((part, way) in parts for part in PARTS[:-1] for way in ("forward", "backward"))
            assert 0.5 * seconds < sum(parts.values()) <= seconds
    assert report.paths[FAST].activation_bytes < report.paths[PLAIN].activation_bytes / 2
    assert capsys.readouterr().out == ""


def test_invented_batch_has_the_true_shape(tiny_recipe, known_rate, capsys):
    """Issue 3: 512 tokens, 15 % masked, CLIP text on 560 of 693 positions."""
    bench_step(tiny_recipe, against="fp32", pairs=1, sequences=2)
    out = " ".join(capsys.readouterr().out.split())
    assert "2 sequences of 512 tokens, CLIP text on 560 positions each" in out
    masked = int(out.split(" mlm targets")[0].split()[-1])
    assert masked == pytest.approx(0.15 * 2 * 510, abs=40)
    assert "matrix products reach 1000 GFLOP/s in fp32, 1000 GFLOP/s in bf16" in out
    assert "share of matrix rate" in out
    assert PLAIN not in out


def test_bf16_is_left_out_where_the_machine_is_slower_in_it(tiny_recipe, monkeypatch, capsys):
    rates = {torch.float32: 1e12, torch.bfloat16: 1e11}
    monkeypatch.setattr("xdscale.bench.step.matmul_flops_per_second", lambda device, dtype: rates[dtype])
    bench_step(tiny_recipe, against="fp32", pairs=1, sequences=1)
    out = " ".join(capsys.readouterr().out.split())
    assert "one step in bf16: left out, this machine computes faster in fp32" in out
    assert "fast bf16" not in out


def test_shards_are_used_where_they_exist(real_recipe, known_rate, capsys):
    bench_step(real_recipe, against="fp32", pairs=1, sequences=1)
    assert "1 sequences of 128 tokens" in " ".join(capsys.readouterr().out.split())


def test_wrong_arguments_are_named(tiny_recipe):
    with pytest.raises(XdscaleError, match=r"--against 'liger': expected one of plain, fp32"):
        bench_step(tiny_recipe, against="liger")
    with pytest.raises(XdscaleError, match="--pairs 0: expected at least 1"):
        bench_step(tiny_recipe, pairs=0)
    with pytest.raises(XdscaleError, match="system = 'mlm': nothing else .* recipe of visualbert, .*vlbert, xdbert$"):
        bench_step(load_recipe("quickstart-mlm"))


def test_a_package_brings_the_bench_of_its_system(tiny_recipe, tmp_path, monkeypatch, capsys):
    class Toy(XDBERTRecipe):
        step_bench: ClassVar[str] = "toy_bench:bench"

    (tmp_path / "toy_bench.py").write_text("def bench(recipe, *rest): print(recipe.model.cross_layers, *rest)")
    monkeypatch.syspath_prepend(str(tmp_path))
    bench_step(Toy(**tiny_recipe.model_dump()), pairs=3)
    assert capsys.readouterr().out == "2 plain 3 None\n"


def test_ratios_are_taken_pair_by_pair():
    def measured(*seconds):
        return Measured(1, 1, list(seconds), list(seconds), [{("optimizer", "forward"): 1.0}] * len(seconds))

    report = StepReport({PLAIN: measured(3.0, 9.0), FAST: measured(2.0, 3.0)}, {}, {}, 0.0, "")
    assert report.ratios(FAST) == [1.5, 3.0]
    assert report.ratios(FAST, without_optimizer=True) == [2.0, 4.0]


def test_a_gpus_parts_are_timed_between_events(monkeypatch):
    """Events stand for a GPU's stream; its host would be past all parts at once."""
    ticks = iter([0.0, 5.0, 8.0, 20.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(ticks)

        def elapsed_time(self, end):
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = xdbert_step._Clock(torch.device("cuda"))
    for part in (("heads", "forward"), None, ("heads", "backward"), None):
        clock.begin(part)
    assert clock.take() == {("heads", "forward"): 0.005, ("heads", "backward"): 0.012}
    assert clock.take() == {}


def test_the_share_of_the_cards_peak_stands_where_the_card_is_known():
    measured = Measured(50 * 10**12, 1, [0.1], [0.1], [{("optimizer", "forward"): 0.0}])
    report = StepReport({FAST: measured}, {torch.float32: 1e15}, {}, 0.0, "", peak=1e15)
    table = step_table(report)
    row = [list(column.cells) for column in table.columns]
    assert dict(zip(*row))["share of the card's bf16 peak"] == "50.0%"
