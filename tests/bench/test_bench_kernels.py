"""`xdscale bench kernels`: contestants that drop nothing compute the same, and one that fails costs its row alone."""

import json

import pytest
import torch

from xdscale.bench import contestants, kernels

SIZES = contestants.Sizes("cpu", attention_samples=1, loss_samples=1, rivals=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: contestants.attention_contestants(SIZES, torch.float32, 0.0),
        lambda: contestants.loss_contestants(SIZES, torch.float32),
        lambda: contestants.loss_contestants(SIZES, torch.float32, 48, 700),
        lambda: contestants.quick_gelu_contestants(SIZES, torch.float32),
        lambda: contestants.activated_linear_contestants(SIZES, torch.float32),
    ],
    ids=["attention", "loss", "loss of another size", "quick_gelu", "activated_linear"],
)
def test_all_contestants_return_the_same_gradients(make):
    ours, *others = (run() for run in make().values())
    assert others
    for found in others:
        for expected, gradient in zip(ours, found, strict=True):
            # The padded attention of one sample has heads before tokens, and keys beyond the shorter length.
            if gradient.ndim == 4:
                gradient = gradient[0].transpose(0, 1)[: len(expected)]
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_plain_attention_is_what_pytorchs_computes():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, count, contestants.HEAD_SIZE) for count in (4, 6, 6))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(contestants._plain_attention(query, key, value, mask, 0.0), expected)


def test_a_rival_that_is_missing_or_fails_costs_its_row_alone(monkeypatch, tmp_path, capsys):
    calls = []

    def fail_later():
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("out of\nmemory")

    def missing():
        import a_rival_that_is_not_installed  # noqa: F401

    named = {"ours": lambda: None, "missing": missing, "fails later": fail_later, "theirs": lambda: None}
    contests = [("sum", lambda: named), ("product", lambda: {"ours": missing, "theirs": lambda: None})]
    monkeypatch.setattr(kernels, "_contests", lambda sizes, dtype: contests)
    monkeypatch.setattr(kernels, "_dtypes", lambda device: [torch.float32])
    rows = kernels.bench_kernels(tmp_path / "rows.jsonl")
    assert [(row.operation, row.contestant, len(row.milliseconds)) for row in rows] == [
        ("sum", "ours", 5),
        ("sum", "missing", 0),
        ("sum", "fails later", 0),
        ("sum", "theirs", 5),
        ("product", "ours", 0),
        ("product", "theirs", 5),
    ]
    assert [row.ratio is None for row in rows] == [False, True, True, False, True, True]
    out = capsys.readouterr().out
    assert "failed: ModuleNotFoundError: No module named 'a_rival_that_is_not_installed'" in out
    assert "failed: ValueError: out of memory" in out
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [entry["contestant"] for entry in written] == [row.contestant for row in rows]


def test_rivals_are_built_when_they_are_called(monkeypatch):
    """Making the contestants imports and compiles nothing, so that no rival can cost another one's row."""
    sizes = contestants.Sizes("cpu", attention_samples=1, loss_samples=1, rivals=True)
    with torch.device("cpu"):
        attention = contestants.attention_contestants(sizes, torch.float32, 0.0)
        loss = contestants.loss_contestants(sizes, torch.float32)
        norm = contestants.norm_contestants(sizes, torch.float32)
    assert {"FlexAttention, padded", "varlen_attn", "cudnn_attention of it"} <= attention.keys()
    assert {"Liger", "linear_cross_entropy", "Cut-Cross-Entropy, without bias"} <= loss.keys()
    with pytest.raises(ModuleNotFoundError):
        norm["dropout, +, Liger's layer_norm"]()
    expected, found = loss["masked_token_loss"](), loss["linear_cross_entropy"]()
    for ours, theirs in zip(expected, found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_on_a_gpu_both_vocabularies_and_attention_without_dropout_compete_too():
    on_cpu, on_gpu = (
        [title for title, _ in kernels._contests(sizes, torch.float32)] for sizes in (SIZES, kernels.GPU_SIZES)
    )
    assert {*on_gpu} - {*on_cpu} == {"attention", "masked-token loss, CLIP's"}
    assert {*on_cpu} < {*on_gpu}


def test_memory_of_a_call_is_its_peak_beside_what_was_there(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 << 20)
    assert kernels._peak_mib(lambda: calls.append("call")) == 7.0
    assert calls == ["reset", "call"]
