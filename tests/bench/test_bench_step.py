import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from xdscale import recipe
from xdscale.bench import plain_model
from xdscale.bench.step import FAST, PARTS, PLAIN, StepReport, activation_bytes, bench_step, measure_step
from xdscale.data.collate import XDBERTCollator
from xdscale.data.stream import Stream
from xdscale.errors import XdscaleError
from xdscale.shards.reader import ShardedSplit
from xdscale.tasks.xdbert import build_adaptation


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small_recipe(cassette_model, clip_tiny, wiki_shards):
    return recipe.Recipe(
        model={"language": {"name": str(cassette_model)}, "clip": {"name": str(clip_tiny), "weights": "random"}},
        data={"shards": str(wiki_shards)},
        training={"steps": 1, "global_batch": 2},
        output={"folder": "unused"},
    )


@pytest.fixture(scope="module")
def small(small_recipe):
    """The real small BERT; CLIP's positions are drawn larger, so that a shifted position would be noticed."""
    torch.manual_seed(0)
    module = build_adaptation(small_recipe).eval()
    torch.nn.init.normal_(module.model.clip.tower.positional_embedding, std=0.3)
    return module


@pytest.fixture(scope="module")
def arrays(small_recipe, wiki_shards):
    """Three real sequences; the third only pads the micro-batch."""
    split = ShardedSplit(wiki_shards, "train")
    stream = Stream(len(split), seed=3, global_batch=2, world_size=1, rank=0, micro_batch=3)
    return XDBERTCollator(split, seed=3, tasks=small_recipe.tasks)(stream.slots(0)[0]).arrays


@pytest.fixture
def batch(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def gradients(module, losses):
    module.zero_grad(set_to_none=True)
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_both_paths_have_the_same_losses_and_gradients(small, batch):
    """Issue 3: within 1e-5 in fp32, without dropout. Padding, ignored labels and skipped rows change nothing."""
    plain = plain_model.plain_losses(small, batch, dropout=0.0)
    expected = gradients(small, list(plain.values()))
    fast = {name: terms[0] for name, terms in small(batch).items()}
    found = gradients(small, list(fast.values()))
    assert {name: loss.item() for name, loss in fast.items()} == pytest.approx(
        {name: loss.item() for name, loss in plain.items()}, rel=1e-5
    )
    assert found.keys() == expected.keys()
    assert len(found) > 100
    for name, gradient in found.items():
        # A key's bias shifts all scores of a row alike, so its true gradient is 0 and only rounding is left of it.
        scale = expected[name.replace("key.bias", "key.weight")].norm()
        assert (gradient - expected[name]).norm() <= 1e-5 * scale, name


def test_encoders_are_those_of_the_libraries(small, batch):
    """The plain encoders against transformers' eager BERT and open_clip's own forward."""
    language, tower = small.model.language, small.model.clip.tower
    used = language.config._attn_implementation
    language.set_attn_implementation("eager")
    with torch.no_grad():
        expected = language(input_ids=batch["language_ids"]).last_hidden_state
        language.set_attn_implementation(used)
        found = plain_model.language_states(language, batch["language_ids"], 0.0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        expected = tower(batch["clip_ids"].flatten(0, 1)).reshape(3, -1, 128)
        found = plain_model.clip_states(small.model.clip, batch["clip_ids"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_changes_losses_and_nothing_else_does(small, batch):
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = (plain_model.plain_losses(small, batch, dropout=rate)["mlm"] for rate in (0.0, 0.0))
        dropped = plain_model.plain_losses(small, batch, dropout=0.1)["mlm"]
    assert first == second
    assert dropped != first


def test_plain_flops_are_those_that_are_done(small, arrays, batch):
    """Against torch's own count of the products that run; the pooled first position is all that it shares."""
    with FlopCounterMode(display=False) as counter:
        losses = plain_model.plain_losses(small, batch, dropout=0.0)
        gradients(small, list(losses.values()))
    assert plain_model.plain_flops(small, arrays) == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert plain_model.plain_flops(small, arrays) > 2 * small.flops(arrays)


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


def test_step_is_measured_and_split(small_recipe, capsys):
    report = measure_step(small_recipe, against="plain", pairs=2, sequences=2)
    assert list(report.paths)[:2] == [PLAIN, FAST]
    assert report.disagreement < 1e-5
    for name, path in report.paths.items():
        assert len(path.seconds) == len(report.ratios(name)) == 2
        for seconds, parts in zip(path.seconds, path.parts):
            assert {part for part, _ in parts} == set(PARTS)
            assert all((part, way) in parts for part in PARTS[:-1] for way in ("forward", "backward"))
            assert 0.8 * seconds < sum(parts.values()) <= seconds
    assert report.paths[FAST].activation_bytes < report.paths[PLAIN].activation_bytes / 3
    assert capsys.readouterr().out == ""


def test_invented_batch_has_the_true_shape(small_recipe, capsys):
    """Issue 3: 512 tokens, 15 % masked, CLIP text on 560 of 693 positions."""
    elsewhere = small_recipe.model_copy(update={"data": recipe.Data(shards="/not/here")})
    bench_step(elsewhere, against="fp32", pairs=1, sequences=1)
    out = " ".join(capsys.readouterr().out.split())
    assert "1 sequences of 512 tokens, CLIP text on 560 positions each" in out
    masked = int(out.split(" mlm targets")[0].split()[-1])
    assert masked == pytest.approx(0.15 * 510, abs=25)
    assert "share of matrix rate" in out
    assert PLAIN not in out


def test_wrong_arguments_are_named(small_recipe):
    with pytest.raises(XdscaleError, match=r"--against 'liger': expected one of plain, fp32"):
        bench_step(small_recipe, against="liger")
    with pytest.raises(XdscaleError, match="--pairs 0: expected at least 1"):
        bench_step(small_recipe, pairs=0)


def test_ratios_are_taken_pair_by_pair():
    from xdscale.bench.step import Measured

    def measured(*seconds):
        return Measured(1, 1, list(seconds), list(seconds), [{("optimizer", "forward"): 1.0}] * len(seconds))

    report = StepReport({PLAIN: measured(3.0, 9.0), FAST: measured(2.0, 3.0)}, {}, {}, 0.0, "")
    assert report.ratios(FAST) == [1.5, 3.0]
    assert report.ratios(FAST, without_optimizer=True) == [2.0, 4.0]
