"""One launch of two ranks gives the facts that several tests compare with the plan."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from xdscale.plan import profile

WORKER = Path(__file__).with_name("engine_worker.py")


PROFILES: dict[tuple[Any, ...], profile.Profile] = {}


@pytest.fixture(scope="module", autouse=True)
def profiled_once() -> Iterator[None]:
    """Has the commands that a module tries out trace a model once, which takes seconds; test_profile judges traces."""
    original = profile.profile_model

    def once(recipe, **options):
        key = (recipe.to_yaml(), *sorted(options.items()))
        if key not in PROFILES:
            PROFILES[key] = original(recipe, **options)
        return PROFILES[key]

    with mock.patch.object(profile, "profile_model", once):
        yield


@pytest.fixture(scope="session")
def run_engines(tmp_path_factory, free_port):
    """Returns a function that runs cases on CPU ranks: {case: [what each rank measured]}."""

    def run(cases, ranks=2):
        folder = tmp_path_factory.mktemp("engines")
        (folder / "cases.json").write_text(json.dumps(cases))
        command = [Path(sys.executable).with_name("deepspeed"), "-q", "--num_accelerators", ranks]
        command += ["--master_port", free_port(), WORKER, "--cases", folder / "cases.json", "--out", folder / "out"]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        measured = zip(*json.loads((folder / "out").read_text()))
        return {case["name"]: list(each) for case, each in zip(cases, measured)}

    return run


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """Overrides for a small model of odd sizes, so that alignment and padding count."""
    folder = tmp_path_factory.mktemp("small")
    language = {"model_type": "bert", "vocab_size": 1501, "hidden_size": 60, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 3, "intermediate_size": 132, "max_position_embeddings": 65}
    (folder / "config.json").write_text(json.dumps(language))
    text = {"context_length": 77, "vocab_size": 907, "width": 52, "heads": 2, "layers": 2}
    (folder / "clip.json").write_text(json.dumps({"embed_dim": 44, "quick_gelu": True, "text_cfg": text}))
    chosen = {"language.name": folder, "language.weights": "random", "language.sha256": "null"}
    chosen |= {"clip.name": folder / "clip.json", "clip.weights": "random"}
    return [f"model.{key}={value}" for key, value in chosen.items()]
