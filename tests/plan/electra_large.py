"""Measures ELECTRA-large on two CPU ranks beside its plan; run by scripts/electra_large.sh, not by the test suite."""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from engine_worker import crafted_batches

from xdscale.ds_config import precision, read_ds_config
from xdscale.plan.planner import GIB
from xdscale.plan.profile import build_on_meta, modules
from xdscale.plan.settings import read_settings
from xdscale.plan.states import model_states
from xdscale.plan.traffic import collectives
from xdscale.recipe import load_recipe
from xdscale.training.tracing import trace

WORKER = Path(__file__).with_name("engine_worker.py")
RANKS, ACCUMULATION, LENGTH, BLOCKS = 2, 2, 128, 2
OVERRIDES = [
    "model.language.weights=random",
    "model.clip.weights=random",
    f"training.global_batch={RANKS * ACCUMULATION}",
]


def measure(stage: int, ds_config: dict) -> list[dict]:
    """Makes two steps under one stage; returns what each rank measured."""
    case = {"name": f"zero{stage}", "recipe": "xdelectra-large-wikitext103", "overrides": OVERRIDES}
    case |= {"length": LENGTH, "blocks": BLOCKS, "ds_config": ds_config}
    with tempfile.TemporaryDirectory() as folder:
        cases, out = Path(folder, "cases.json"), Path(folder, "out.json")
        cases.write_text(json.dumps([case]))
        launcher = Path(sys.executable).with_name("deepspeed")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            launcher,
            "-q",
            "--num_accelerators",
            RANKS,
            "--master_port",
            port,
            WORKER,
            "--cases",
            cases,
            "--out",
            out,
        ]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(result.stderr[-3000:])
        return [rank[0] for rank in json.loads(out.read_text())]


def config(stage: int, fp32: bool) -> dict:
    """The shipped configuration, one sequence at a time."""
    values = read_ds_config(f"ds_configs/electra-large-zero{stage}.json") | {"train_micro_batch_size_per_gpu": 1}
    return {key: value for key, value in values.items() if not fp32 or key not in ("bf16", "data_types")}


def report(stage: int, ds_config: dict, measured: list[dict]) -> None:
    """Prints one row per rank."""
    spec = load_recipe("xdelectra-large-wikitext103", OVERRIDES)
    module, settings = build_on_meta(spec).train(), read_settings(ds_config)
    module.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision(ds_config)])
    found = modules(module)
    (batch,) = crafted_batches(spec, module, LENGTH, BLOCKS, 1, 1, 0)
    active = trace(module, batch.arrays, spec.objectives.weights()).peak_bytes
    planned = sum(each.payload_bytes for each in collectives(found, settings, RANKS, ACCUMULATION, 3))
    for rank, result in enumerate(measured):
        states = model_states(found, settings, RANKS, rank)
        moments = [result[name] for name in ("accumulating", "boundary")]
        held = max(sum(moment.values()) - moment["buckets"] for moment in moments)
        sent = sum(payload for _, payload in result["collectives"].values())
        peak = (states.device + states.host + active) / GIB
        columns = (
            f"ZeRO-{stage}, rank {rank}, {result['seconds']:.0f} s",
            f"model states planned {states.resident / GIB:.3f} GiB, measured {held / GIB:.3f}",
            f"difference {states.resident / held - 1:+.2%}",
            f"payload planned {planned:,} bytes, counted {sent:,}",
            f"peak planned {peak:.2f} GiB, measured {result['peak_gib'] - result['imports_gib']:.2f} above imports",
        )
        print(*columns, sep="; ", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    for stage in options.stages:
        values = config(stage, options.fp32)
        report(stage, values, measure(stage, values))
