"""What is asked of a command arrives where its work is done: every argument and option, none with its default."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from xdscale.cli import app
from xdscale.finetune.command import Request
from xdscale.launch.hosts import Host
from xdscale.launch.slurm import SlurmRequest
from xdscale.launch.start import Rendezvous

JOB = SimpleNamespace(split="split", recipe="recipe", name="name")
MEET = Rendezvous("first", 7, 8)
HOSTS = ["--hosts", "a:2,b:2", "--master-addr", "first", "--master-port", "7", "--ssh-port", "8"]
STARTED = {"env": ["A=1", "B=2"], "run": True, "force": True}
PLANNED = {"sequence_length": 64, "precision": "fp16", "checkpointing": True, "as_json": True}
GPU = ["--gpus", "3", "--gpu", "mine", "--nodes", "2", "--gpu-memory", "9", "--mfu", "0.3", "--price", "5"]
GPU += ["--tflops", "11", "--bandwidth", "12", "--network", "13"]
NO_PEAKS = dict.fromkeys(("tflops", "bandwidth", "network"))
SLURM = {"nodes": 2, "gpus_per_node": 3, "time": "1:00:00", "partition": "p", "account": "a", "qos": "q"}
SLURM |= {"constraint": "c", "cpus_per_task": 4}
FINETUNE = {
    "model": "m",
    "subject": "vlbert",
    "tasks": ["rte", "mrpc"],
    "data": "d",
    "regions": "r",
    "out": Path("o"),
    "seeds": 2,
    "label": "l",
    "recipe": "quickstart",
    "overrides": ["a=1", "b=2"],
    "ds_config": "c",
    "jobs": 3,
}
SHAPE = {"sequence_length": None, "precision": None, "checkpointing": False}
"""Of a plan with counts of GPUs, where nothing is typed."""
CASES = {
    "train r a=1 b=2 --deepspeed-config c --ranks 3": [("launch.train.train_here", ("r", ["a=1", "b=2"], "c", 3), {})],
    " ".join(["plan r a=1", *GPU, "--sequence-length 64 --precision fp16 --checkpointing --json --write-configs w"]): [
        ("plan.report.machine_from", ("mine", 3, 2, 9.0, 0.3, 5.0), {"tflops": 11, "bandwidth": 12, "network": 13}),
        ("plan.report.run_plan", ("r", ["a=1"], None), PLANNED | {"write_configs": Path("w")}),
    ],
    "plan r a=1 --scaling --chart c.svg --json": [
        (
            "plan.report.machine_from",
            ("A100-80G", 8, None, None, 0.4, None),
            NO_PEAKS,
        ),
        ("plan.report.run_scaling", ("r", ["a=1"], None), SHAPE | {"as_json": True, "chart": Path("c.svg")}),
    ],
    "plan r --chart c.svg": [
        (
            "plan.report.machine_from",
            ("A100-80G", 8, None, None, 0.4, None),
            NO_PEAKS,
        ),
        ("plan.report.run_scaling", ("r", [], None), SHAPE | {"as_json": False, "chart": Path("c.svg")}),
    ],
    "export r o --step 7": [("export.export_run", (Path("r"), Path("o")), {"step": 7})],
    "finetune a=1 b=2 --model m --task rte --task mrpc --out o --data d --seeds 2 --regions r --subject vlbert "
    "--label l --recipe quickstart --jobs 3 --deepspeed-config c": [
        ("finetune.command.run_command", (Request(**FINETUNE),), {})
    ],
    "report a b --layout table-3 --baseline x --baseline y --metric mrpc=f1 --out o": [
        (
            "report.command.make_report",
            ([Path("a"), Path("b")],),
            {"layout": "table-3", "baselines": ["x", "y"], "metrics": ["mrpc=f1"], "out": Path("o")},
        )
    ],
    "replay r 7 data.shards=s": [("commands.replay.replay", (Path("r"), 7, ["data.shards=s"]), {})],
    "kernels report --write w --check c": [
        ("commands.kernel_report.print_report", (), {"write": Path("w"), "check": Path("c")})
    ],
    " ".join(["doctor r a=1", *HOSTS, "--timeout 9"]): [
        ("launch.doctor.examine", ([Host("a", 2), Host("b", 2)], MEET, "r", ["a=1"]), {"timeout_seconds": 9})
    ],
    " ".join(["launch r a=1 --deepspeed-config c", *HOSTS, "--env A=1 --env B=2 --out o --run --force"]): [
        ("launch.job.check_job", ("r", ["a=1"], "c", 4), {}),
        ("launch.job.path_warnings", ("recipe",), {}),
        ("launch.command.launch_on_hosts", (JOB, [Host("a", 2), Host("b", 2)], MEET, Path("o")), STARTED),
    ],
    "launch r --slurm --env A=1 --env B=2 --run --force "
    + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SLURM.items()): [
        ("launch.job.check_job", ("r", [], None, 6), {}),
        ("launch.job.path_warnings", ("recipe",), {}),
        ("launch.command.launch_on_slurm", (JOB, SlurmRequest(**SLURM), Path("launch/name")), STARTED),
    ],
}
GIVES = {"launch.job.check_job": JOB, "launch.job.path_warnings": [], "report.command.make_report": []}


@pytest.mark.parametrize("words", CASES, ids=lambda words: words[:12])
def test_every_option_arrives(words, monkeypatch):
    calls = []
    for place in {place for case in CASES.values() for place, _, _ in case}:

        def called(*given, _place=place, **options):
            calls.append((_place, given, options))
            return GIVES.get(_place)

        monkeypatch.setattr(f"xdscale.{place}", called)
    done = CliRunner().invoke(app, words.split(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert calls == CASES[words]


def test_the_keys_shown_are_those_of_the_kind_of_recipe_that_is_asked_for():
    """Recipes of both kinds may have one name."""

    def shown(*words):
        done = CliRunner().invoke(app, ["recipes", *words], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert "cross_layers" in shown("quickstart")
    assert "seeds" in shown("quickstart", "--finetuning")
    assert "cross_layers" not in shown("quickstart", "--finetuning")
    assert "quickstart-mlm" in shown()
    assert "quickstart-mlm" not in shown("--finetuning")
    assert "paper" in shown("--finetuning").split()
    assert "7" in shown("quickstart", "training.seed=7")
