"""The plan as a whole: what fits, what is suggested, what it costs, and how it is said."""

import contextlib
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest

from xdscale.cli import main
from xdscale.ds_config import resolve_ds_config
from xdscale.errors import XdscaleError
from xdscale.plan import profile
from xdscale.plan.cluster import Cluster
from xdscale.plan.configs import WAYS, ds_config
from xdscale.plan.hardware import GPUS, find_gpu, usable_gib
from xdscale.plan.planner import GIB, Machine, make_plan
from xdscale.plan.report import machine_from, print_plan
from xdscale.plan.settings import read_settings
from xdscale.plan.states import model_states
from xdscale.recipe import load_recipe

LARGE = load_recipe("xdelectra-large-wikipedia")


def large(precision="bf16", **options):
    """With the values that the command gives too, so that both trace the model once."""
    options = {"checkpointing": False, "sequence_length": None} | options
    return profile.profile_model(LARGE, precision=precision, **options)


def plan(recipe=LARGE, gpu="A100-80G", gpus=8, memory_gib=None, **options):
    kind = find_gpu(gpu)
    cluster = Cluster(kind, gpus, -(-gpus // kind.node_gpus))
    machine = Machine(cluster=cluster, memory_gib=memory_gib or kind.memory_gib, price=2.0)
    return make_plan("large", recipe, machine, large(kind.precision, **options))


def run(*arguments):
    """Runs `xdscale plan` as the command line does, in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2)]
    with (
        contextlib.redirect_stdout(streams[0]),
        contextlib.redirect_stderr(streams[1]),
        mock.patch.object(sys, "argv", ["xdscale", "plan", *arguments]),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return SimpleNamespace(returncode=ended.value.code, stdout=texts[0], stderr=texts[1])


@pytest.mark.parametrize(
    ("way", "precision", "per_rank"),
    [
        ("zero0", "fp32", lambda p, n: 16 * p),
        ("zero2", "bf16", lambda p, n: 2 * p + 16 * p / n),
        ("zero3", "bf16", lambda p, n: 18 * p / n),
        ("zero1", "bf16", lambda p, n: 8 * p + 12 * p / n),
    ],
)
@pytest.mark.parametrize("ranks", [8, 64])
def test_model_states_follow_the_formulas_of_the_zero_paper(way, precision, per_rank, ranks):
    """With gradients summed in fp32 beside bf16 parameters; DeepSpeed's estimator for stage 2 says 2P + 18P / N. Small
    parameters stay whole under stage 3."""
    found, parameters = large().modules, 445_118_524
    settings = read_settings(ds_config(way, precision, 1, parameters))
    states = model_states(found, settings, ranks)
    kept_whole = settings.persistence_threshold
    small = 2 * sum(size for module in found for size in module.own if size <= kept_whole) * (way == "zero3")
    assert states.resident == pytest.approx(per_rank(parameters, ranks) + small, rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "more"),
    [
        (["optim.ema_decay=0.999"], 4),
        (["optim.optimizer=sgd"], -4),
        (["optim.optimizer=sgd", "optim.ema_decay=0.9"], 0),
    ],
)
def test_states_are_those_of_the_recipes_optimizer_and_moving_average(overrides, more):
    """AdamW keeps two moments, SGD one; the average is a third fp32 number per trained parameter, cut as those are."""
    made = plan(load_recipe("xdelectra-large-wikipedia", overrides))
    for row, usual in zip(made.rows, plan().rows, strict=True):
        parts = 1 if row.way == "zero0" else 8
        place = "host" if row.way.endswith("offload") else "optimizer"
        difference = getattr(row.states, place) - getattr(usual.states, place)
        assert difference == pytest.approx(more * made.trained / parts, rel=1e-3)


def test_offloading_moves_bytes_to_the_host():
    for row, offloaded in zip(plan().rows[2:4], plan().rows[4:]):
        assert offloaded.states.optimizer == 0
        assert offloaded.states.host > row.states.optimizer
        assert offloaded.device_bytes < row.device_bytes
        assert offloaded.step_seconds > row.step_seconds
    # The same collectives; beside them gradients in fp32 to the host, AdamW there (28 bytes each), parameters back.
    _, _, whole, _, offloaded, _ = plan().rows
    part = 445_118_524 / 8
    seconds = part * ((4 + 2) / 25e9 + 28 / 20e9)
    assert offloaded.communication_seconds - whole.communication_seconds == pytest.approx(seconds, rel=1e-6)


def test_what_is_suggested_is_what_training_resolves():
    for gpus in (8, 16, 64, 200):
        for row in plan(gpus=gpus).rows:
            values = {"train_micro_batch_size_per_gpu": row.largest_micro_batch}
            resolved = resolve_ds_config("x", values, LARGE, gpus)
            assert row.micro_batch == resolved["train_micro_batch_size_per_gpu"]
            assert row.accumulation == resolved["gradient_accumulation_steps"]
            assert row.padding == pytest.approx(1 - 288 / (gpus * row.micro_batch * row.accumulation))


def test_largest_micro_batch_is_the_largest_that_fits():
    for row in plan(gpu="L4").rows:
        one = row.activations.total / row.micro_batch
        room = usable_gib(find_gpu("L4").memory_gib) * GIB - row.states.device
        assert row.largest_micro_batch == pytest.approx(room / one, abs=1.5)


def test_time_and_cost_add_up():
    made = plan(load_recipe("xdelectra-large-wikipedia", ["training.steps=22000"]))
    row = made.rows[1]
    computing = made.flops_per_sequence * 36 / (0.4 * 312e12)
    assert row.step_seconds == pytest.approx(computing + row.communication_seconds)
    assert row.hours == pytest.approx(22_000 * row.step_seconds / 3600)
    assert row.cost == pytest.approx(8 * 2.0 * row.hours)


def test_the_simplest_of_what_is_equally_fast_is_recommended():
    assert plan().best == "zero1"
    # No room for two copies of all gradients, only for a share of them.
    tight = plan(memory_gib=6.5, checkpointing=True, sequence_length=128)
    seconds = {row.way: row.step_seconds or float("inf") for row in tight.rows if row.way in WAYS}
    near = [way for way in WAYS if seconds[way] <= 1.05 * min(seconds.values())]
    assert (seconds["zero1"], tight.best) == (float("inf"), near[0])


def test_nothing_fits_and_checkpointing_helps():
    assert plan(memory_gib=3).best is None
    kept, recomputed = (plan(checkpointing=on).rows[2].largest_micro_batch for on in (False, True))
    assert recomputed > 3 * kept


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_of_the_table_trains_every_model(gpu):
    assert plan(gpu=gpu).best is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("A100", "did you mean A100-40G or A100-80G"),
        ("V100", "did you mean V100-32G or V100-16G"),
        ("H10-80G", "H100-80G"),
        ("potato", "known: V100-32G"),
    ],
)
def test_unknown_gpu(name, message):
    with pytest.raises(XdscaleError, match=message):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("h100", "H100-80G"),
        ("H100 80g", "H100-80G"),
        ("NVIDIA H100 80GB HBM3", "H100-80G"),  # as nvidia-smi names it, and so on
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("Tesla V100-SXM2-16GB", "V100-16G"),
        ("Tesla T4", "T4-16G"),
        ("NVIDIA A10", "A10-24G"),
        ("NVIDIA RTX A6000", "A6000-48G"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090-24G"),
        ("rtx4090", "RTX-4090-24G"),
        ("RTX 5090", "RTX-5090-32G"),
        ("AMD Instinct MI250X", "MI250X-64G"),
        ("mi300x", "MI300X-192G"),
    ],
)
def test_gpu_names_are_forgiving(name, known):
    assert find_gpu(name).name == known


def test_a_gpu_of_ones_own_is_planned_for_as_the_table_would():
    """Described by the numbers of a card in the table it gives that card's plan, but for what nothing is known of."""
    known = find_gpu("L40S")
    own = machine_from("Mine", 16, 2, 44.5, 0.4, None, tflops=362, bandwidth=32)
    assert own.cluster.gpu == replace(known, name="Mine", price=None)
    made, expected = (
        make_plan("x", LARGE, machine, large()) for machine in (own, machine_from("L40S", 16, 2, None, 0.4, 1))
    )
    assert [row.step_seconds for row in made.rows] == [row.step_seconds for row in expected.rows]
    assert {row.cost for row in made.rows} == {None}
    network = machine_from("Mine", 16, 2, 44.5, 0.4, 2, tflops=362, bandwidth=32, network=50)
    faster = make_plan("x", LARGE, network, large())
    assert all(row.step_seconds < before.step_seconds for row, before in zip(faster.rows, made.rows))
    assert faster.rows[1].cost == pytest.approx(16 * 2 * faster.rows[1].hours)


def test_single_values_replace_those_of_the_table():
    gpu = machine_from("H100", 8, None, 60, 0.4, None, tflops=756, bandwidth=64).cluster.gpu
    assert (gpu.name, gpu.memory_gib, gpu.peak_flops, gpu.node_link) == ("H100-80G", 60, 756e12, 64e9)


def test_padding_and_idle_gpus_are_told():
    told = run("xdbert-base-wikitext103", "--gpus", "64").stdout
    assert "10.0% of what the 64 GPUs compute is padding" in told
    assert "of computing; starting its kernels takes the host tens of ms" in " ".join(told.split())
    told = run("xdbert-base-wikitext103", "--gpus", "16").stdout
    assert "padding:" not in told
    assert "starting its kernels" not in " ".join(told.split())
    scaled = run("xdbert-base-wikitext103", "--scaling", "--gpu", "Mine", "--gpu-memory", "80", "--tflops", "90")
    assert scaled.returncode == 2
    scaled = run("xdbert-base-wikitext103", "--scaling")
    assert "288 sequences feed at most 288 GPUs, no row for 512, 1,024" in scaled.stderr


def test_prints_tables_and_a_recommendation():
    result = run("xdbert-base-wikitext103", "--gpus", "8", "--gpu-memory", "40", "--nodes", "1", "--gpu", "H100-80G")
    assert result.returncode == 0
    for words in (
        "202,996,284 trained parameters, 590,593 not trained",
        "zero3-offload",
        "--deepspeed-config bert-base-zero1 ",
        "a step is 1 micro-batch of 36.",
    ):
        assert words in result.stdout


def test_a_mistake_does_not_wait_for_torch():
    program = "import sys\nfrom xdscale.cli import main\nsys.argv = ['xdscale', *sys.argv[1:]]\ntry:\n    main()\n"
    program += "finally:\n    print('torch' in sys.modules)"
    for mistake in (["nobody"], ["xdbert-base-mlm", "--gpu", "potato"], ["xdbert-base-mlm", "--gpus", "512"]):
        result = subprocess.run(
            [sys.executable, "-c", program, "plan", *mistake], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout) == (2, "False\n"), result.stderr


def test_json_is_the_whole_plan():
    result = run("xdelectra-large-wikipedia", "--gpu", "V100-32G", "--json")
    values = json.loads(result.stdout)
    assert values["precision"] == "fp16"
    assert [row["way"] for row in values["rows"]] == [*WAYS]  # stage 0 in fp16 is refused
    assert (values["trained"], values["frozen"]) == (445_118_524, 1)
    assert values["rows"][0]["activations"].keys() == {"kept", "working"}
    assert result.stdout == json.dumps(values, indent=2) + "\n"
    scaled = run("xdelectra-large-wikipedia", "--scaling", "--json").stdout
    curves = json.loads(scaled)
    assert scaled == json.dumps(curves, indent=2) + "\n"
    assert [[points[0]["gpus"], points[0]["efficiency"]] for points in curves.values()] == [[1, 1.0]] * 2
    for points in curves.values():
        for point in points:
            assert point["hours"] == pytest.approx(point["steps"] * point["step_seconds"] / 3600)
            alone = points[0]["global_batch"] / points[0]["step_seconds"]
            each = point["global_batch"] / point["step_seconds"] / point["gpus"]
            assert point["efficiency"] == pytest.approx(each / alone)


def test_says_what_to_do_when_nothing_fits():
    result = run("xdelectra-large-wikipedia", "--gpu", "L4", "--gpu-memory", "3")
    assert "Nothing fits: even zero3-offload with a micro-batch of 1" in result.stdout
    assert "--checkpointing" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["xdbert-base-wikitext103", "--gpus", "9", "--nodes", "2"], "do not divide evenly"),
        (["xdbert-base-wikitext103", "--gpu", "A100-8OG"], "A100-80G"),
        (["xdbert-base-wikitext103", "--gpus", "512"], "feeds at most 288 ranks, not 512"),
        (["xdbert-base-wikitext103", "--gpu", "Mine", "--gpu-memory", "20"], "needs --gpu-memory, --tflops and"),
        (["xdbert-base-wikitext103", "--tflops", "inf"], "--tflops inf"),
        (["xdbert-base-wikitext103", "--gpu", "V100-32G", "--precision", "bf16"], "V100-32G computes in fp16"),
        (["xdbert-base-wikitext103", "--sequence-length", "1024"], "sequence length 1024"),
        (["xdbert-base-wikitext103", "--gpu-memory", "2", "--write-configs", "c"], "nothing fits, nothing written"),
        (["xdbert-bse-wikitext103", "--write-configs", "/dev/null"], "--write-configs /dev/null: exists and is not a"),
        (
            ["xdbert-base-wikitext103", "--scaling", "--write-configs", "c"],
            "--write-configs c: goes with one number of",
        ),
        (["xdbert-base-wikitext103", "--chart", "c.svg", "--nodes", "2"], "--nodes 2: goes with"),
        (["xdbert-base-wikitext103", "--scaling", "--chart", "c.png"], "c.png: the chart is written as SVG"),
        (["xdbert-base-wikitext103", "--scaling", "--chart", "."], ".: cannot be written: it is a folder"),
        (["xdbert-base-wikitext103", "--scaling", "--chart", "/dev/full"], "cannot be written: No space left"),
        (["xdbert-bse-wikitext103"], "did you mean 'xdbert-base-wikitext103'"),
        (["xdbert-base-mlm", "model.language.name=./nowhere"], "./nowhere"),
        (["xdbert-base-mlm", "model.clip.name=ViT-Z-99"], "ViT-Z-99"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.returncode, list(tmp_path.iterdir())) == (2, [])
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def cells(text):
    """The rows of both tables by way: what stands behind it."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│ " in line]
    ways = ("zero0", *WAYS)
    memory, time = (
        {row[0]: row[1:] for row in part if row[0] in ways} for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :])
    )
    return memory, time


@pytest.mark.parametrize(("gpus", "memory"), [("8", "40"), ("3", "9")])
def test_what_is_printed_adds_up(gpus, memory):
    """Bytes to their sum, hours from seconds, dollars from hours, traffic as each way has it."""
    told = run("xdelectra-large-wikipedia", "--gpus", gpus, "--gpu-memory", memory, "--price", "2", "--mfu", "0.35")
    bytes_of, time_of = cells(told.stdout)
    made = {row.way: row for row in machine_plan(int(gpus), float(memory)).rows}
    assert bytes_of.keys() == time_of.keys() == made.keys()
    assert "MFU 35%; links at 43%, nothing hidden behind computing; $2 per GPU and hour (--price)" in told.stdout
    for way, row in made.items():
        *parts, total, host = map(float, bytes_of[way])
        assert sum(parts) == pytest.approx(total, abs=0.04)
        assert total == pytest.approx(row.device_bytes / GIB, abs=0.006)
        assert host == pytest.approx(row.states.host / GIB, abs=0.006)
        given = [row.states.parameters, row.states.gradients, row.states.optimizer]
        assert parts[:3] == pytest.approx([value / GIB for value in given], abs=0.006)
        assert parts[3:5] == pytest.approx([row.activations.kept / GIB, row.activations.working / GIB], abs=0.006)
        if row.step_seconds is None:
            assert time_of[way][0] == "does not fit"
            assert not any(time_of[way][1:])
            continue
        largest, chosen, times, padding, payload, sent, seconds, waiting, hours, dollars = time_of[way]
        assert [int(largest), int(chosen), int(times)] == [row.largest_micro_batch, row.micro_batch, row.accumulation]
        assert padding == f"{1 - 288 / (int(gpus) * int(chosen) * int(times)):.1%}"
        assert [float(payload), float(sent)] == pytest.approx(
            [row.payload_bytes / 1e9, row.wire_bytes / 1e9], abs=0.006
        )
        assert float(seconds) == pytest.approx(row.step_seconds, abs=6e-4)
        assert waiting == f"{row.communication_seconds / row.step_seconds:.0%}"
        assert float(hours) == pytest.approx(LARGE.training.steps * row.step_seconds / 3600, abs=0.006)
        assert float(dollars.replace(",", "")) == pytest.approx(int(gpus) * 2 * row.hours, abs=0.006)


def machine_plan(gpus, memory_gib):
    machine = machine_from("A100-80G", gpus, None, memory_gib, 0.35, 2)
    return make_plan("xdelectra-large-wikipedia", LARGE, machine, large())


def test_a_recommendation_says_how_often_and_on_how_many_nodes():
    told = " ".join(run("xdbert-base-wikitext103", "--gpus", "1", "--gpu", "A100-40G").stdout.split())
    assert re.search(
        r"1 × A100-40G in 1 node, bf16, sequences of 512, [\d.]+ TFLOP each; 35\.9 of 39\.4 GiB usable", told
    )
    assert re.search(r"a step is (\d+) micro-batches of \d+\. 1\.5 GiB for the context and 5% for fragmentation", told)
    told = run("xdbert-base-wikitext103", "--gpus", "16").stdout
    assert "16 × A100-80G in 2 nodes, " in told
    assert "images a second" not in told


def test_a_path_is_printed_as_it_is(monkeypatch, capsys):
    """Also to a terminal, where rich might take a part of it for markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    print_plan(replace(plan(), recipe="runs[/x]/[red]a.yaml"))
    assert "runs[/x]/[red]a.yaml: 445,118,524 trained parameters, 1 not trained" in capsys.readouterr().out
