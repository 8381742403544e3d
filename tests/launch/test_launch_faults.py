"""What hardly happens when runs are started and machines examined: each is one message, or does what it should."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed

from xdscale.ds_config import read_ds_config
from xdscale.errors import EXIT_BAD_INPUT, XdscaleError
from xdscale.launch import command, doctor, exchange, facts, probe, train
from xdscale.launch.hosts import Host
from xdscale.launch.job import check_job
from xdscale.launch.slurm import SlurmRequest
from xdscale.launch.start import Rendezvous
from xdscale.launch.verdict import Evidence, judge
from xdscale.recipe import load_recipe
from xdscale.shards.manifest import Manifest

MEET = Rendezvous("node-1", 29500)


def test_the_source_is_the_same_however_its_packages_are_put_in_place(tmp_path, monkeypatch):
    """In a checkout kernels and shards lie beside xdscale, in a wheel within it."""

    def hashed(places):
        found = {name: SimpleNamespace(submodule_search_locations=[str(path)]) for name, path in places.items()}
        monkeypatch.setattr(facts.importlib.util, "find_spec", found.__getitem__)
        return facts.source_hash()

    def written(folder, kernel="k = 1"):
        for name, text in (("cli.py", "c"), ("plan/a.py", "a"), ("kernels/k.py", kernel), ("shards/s.py", "s")):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return {"xdscale": folder, "xdscale.kernels": folder / "kernels", "xdscale.shards": folder / "shards"}

    wheel = written(tmp_path / "wheel")
    whole = hashed(wheel)
    checkout = dict(wheel, xdscale=shutil.copytree(tmp_path / "wheel", tmp_path / "checkout"))
    for name in ("kernels", "shards"):
        checkout[f"xdscale.{name}"] = shutil.move(tmp_path / "checkout" / name, tmp_path / name)
    assert hashed(checkout) == whole
    assert len(whole) == 12
    assert hashed(written(tmp_path / "other", "k = 2")) != whole
    (tmp_path / "checkout" / "plan" / "a.py").rename(tmp_path / "checkout" / "plan" / "b.py")
    assert hashed(checkout) != whole


def test_a_package_that_is_not_there_is_missing(monkeypatch):
    monkeypatch.setattr(facts, "PACKAGES", ("numpy", "no-such-package-anywhere"))
    found = facts._versions()
    assert list(found) == ["python", "xdscale", "numpy", "no-such-package-anywhere", "xdscale source"]
    assert found["no-such-package-anywhere"] == "missing"


@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_machine_names_the_gpus_that_ranks_may_use(monkeypatch, tmp_path, on_cpu):
    monkeypatch.setattr(facts, "asked_for_cpu", lambda: on_cpu)
    monkeypatch.setattr(facts, "_driver", lambda: "570.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    found = facts.HostFacts.of_this_machine(3, 2, None)
    assert (found.gpus, found.driver) == (([], "") if on_cpu else (["card 0", "card 1"], "570.1"))
    assert (found.rank, found.local_ranks, found.triton_cache) == (3, 2, str(tmp_path))
    assert found.environment["NCCL_DEBUG"] == "INFO"
    assert (found.shards_fingerprint, found.shards_problem, found.output_free_bytes) == (None, "", None)
    assert found.cores == len(os.sched_getaffinity(0))
    assert found.shared_memory_gib == pytest.approx(shutil.disk_usage("/dev/shm").total / 2**30)


def test_a_name_that_stands_for_no_address_is_no_loopback(monkeypatch):
    def unknown(name):
        raise OSError("Name or service not known")

    monkeypatch.setattr("socket.gethostbyname", unknown)
    monkeypatch.setenv("MASTER_ADDR", "first")
    assert facts._name_is_loopback() is False


def test_shards_of_this_machine_are_those_that_dataset_json_names(wiki_shards, tmp_path):
    folder = shutil.copytree(wiki_shards, tmp_path / "shards")
    recipe = load_recipe("quickstart", [f"data.shards={folder}", f"output.folder={tmp_path / 'a' / 'b'}"])
    found = facts._recipe_facts(recipe)
    assert found["shards_fingerprint"] == Manifest.load(folder).fingerprint
    assert found["output_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    shard = Manifest.load(folder).shards[-1]
    path = folder / shard.file
    os.truncate(path, shard.bytes - 1)
    expected = f"{path}: {shard.bytes - 1} bytes, dataset.json says {shard.bytes}"
    assert facts._recipe_facts(recipe)["shards_problem"] == expected
    path.unlink()
    found = facts._recipe_facts(recipe)
    assert (found["shards_problem"], found.get("shards_fingerprint")) == (f"{path}: missing", None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("Connection reset\nby peer"), "lost the connection to the other ranks: Connection reset"),
        (XdscaleError("data.shards: none"), "data.shards: none"),
    ],
)
def test_whatever_ends_a_probe_is_one_line(monkeypatch, capsys, error, said):
    def fail(rank, world_size, timeout_seconds):
        assert (rank, world_size, timeout_seconds) == (3, 4, 7)
        raise error

    monkeypatch.setattr(probe, "_meet", fail)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert probe.main(["--timeout", "7"]) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: rank 3: {said}\n"


@pytest.mark.parametrize(("local_rank", "is_asked"), [("0", True), ("1", False)])
@pytest.mark.parametrize("word", ["go", "stop"])
def test_a_rank_does_what_the_first_one_says(monkeypatch, local_rank, is_asked, word):
    """Where a machine is silent the others end; a machine's first rank alone speaks for it."""
    store, done = torch.distributed.HashStore(), []
    store.set("token", "")
    store.set("go", word)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(exchange, "ask_clock", lambda store, rank: done.append(("clock", rank)))
    monkeypatch.setattr(exchange, "follow_token", lambda store, rank, folder, token: done.append(("folder", folder)))
    monkeypatch.setattr(probe, "_facts", lambda rank, recipe: {"rank": rank})
    monkeypatch.setattr(probe, "_try_collective", lambda *given: done.append(("all-reduce", given[1:])))
    recipe = SimpleNamespace(output=SimpleNamespace(folder="/runs/x"))
    assert probe._follow(store, 5, 8, recipe, 9) == 0
    asked = [("clock", 5), ("folder", Path("/runs/x"))] if is_asked else []
    assert done == ([*asked, ("all-reduce", (5, 8, 9))] if word == "go" else [])
    assert json.loads(store.get("facts/5")) == ({"rank": 5} if is_asked else None)


def test_a_folder_that_takes_no_second_file_is_told(tmp_path, monkeypatch):
    store, token = torch.distributed.HashStore(), "token"
    (tmp_path / token).touch()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange.Path, "touch", full)
    exchange.follow_token(store, 2, tmp_path, token)
    assert json.loads(store.get("folder/2")) == "cannot be written: [Errno 28] No space left on device"


def test_where_no_token_could_be_left_nothing_is_taken_away(tmp_path, monkeypatch):
    """The folder may be that of a run."""
    (tmp_path / "log.jsonl").write_text("")

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange.Path, "touch", full)
    token = exchange.OutputToken(tmp_path)
    token.leave()
    found = token.problems(torch.distributed.HashStore(), [0], 1)
    assert found == {0: "cannot be written: [Errno 28] No space left on device"}
    token.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_machines_that_nobody_named_are_called_silent():
    found = Evidence(names=["", "", "b"], silent=[0, 1, 2])
    assert [found.label(rank) for rank in range(3)] == ["(silent)", "(silent)", "b"]
    said = [(one.host, one.check, one.text.partition(" did not answer")[0]) for one in judge(found)]
    assert said == [("(silent)", "answer", "ranks 0 to 1"), ("b", "answer", "rank 2")]


def test_a_machine_without_nvidias_program_lists_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert train._known_to_the_driver() == []


def test_a_doctor_without_room_for_its_files_says_so(monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device", "/tmp")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(XdscaleError, match=r"^no temporary folder can be made: .*No space left.*; make room there, or"):
        doctor.examine([Host("localhost", 1)], MEET, None, [], timeout_seconds=1)


def test_a_step_of_tokens_is_told_in_tokens():
    overrides = ["training.global_batch=null", "training.batch_tokens=900"]
    found = check_job("quickstart-visualbert", overrides, "quickstart-zero2", 2)
    most = read_ds_config("quickstart-zero2")["train_micro_batch_size_per_gpu"]
    assert found.split == f"a step of at most 900 tokens, in micro-batches of at most {most}"


@pytest.fixture
def become(monkeypatch, tmp_path):
    """What this process becomes: program, words, and what is set for it beside what is there."""
    found = []

    def execute(name, words, environment):
        before = {key: value for key, value in os.environ.items() if environment.get(key) == value}
        assert before.keys() >= os.environ.keys() - {key for key in environment if key not in before}
        found.append((name, words, {key: environment[key] for key in environment.keys() - before.keys()}))
        raise StopIteration

    monkeypatch.setattr(os, "execvpe", execute)
    for name in ("pdsh", "ssh", "sbatch"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    return found


def test_what_is_to_run_becomes_this_process(become, tmp_path, capsys):
    job = check_job("quickstart", [], None, 2)
    how = {"env": ["X=1"], "run": True, "force": False}
    with pytest.raises(StopIteration):
        command.launch_on_hosts(job, [Host("a", 1), Host("b", 1)], MEET, tmp_path / "out", **how)
    name, words, environment = become[-1]
    assert words[0] == name
    assert words[-len(job.arguments) :] == list(job.arguments)
    assert environment == {"DS_ENV_FILE": str(tmp_path / "out" / ".deepspeed_env")}
    assert "X=1" in (tmp_path / "out" / ".deepspeed_env").read_text().splitlines()
    assert " ".join(words[:2]) in capsys.readouterr().err
    with pytest.raises(StopIteration):
        command.launch_on_hosts(job, [Host("localhost", 2)], MEET, tmp_path / "here", **how)
    assert become[-1][2]["X"] == "1"
    assert "DS_ENV_FILE" not in become[-1][2]
    request = SlurmRequest(nodes=2, gpus_per_node=1)
    with pytest.raises(StopIteration):
        command.launch_on_slurm(job, request, tmp_path / "slurm", **how)
    assert become[-1] == ("sbatch", ["sbatch", str(tmp_path / "slurm" / "job.sbatch")], {})


@pytest.fixture
def led(monkeypatch):
    """Has the first rank lead with what others left in the store; returns what it found out and what it did."""
    done, found = [], []
    own = {"rank": 0, "host": "a", "versions": {}, "gpus": [], "driver": "", "local_ranks": 2, "cores": 4}
    own |= {"environment": {}, "triton_cache": "/t", "triton_cache_kind": "ext4", "open_files": 9}
    own |= {"shared_memory_gib": 1.0, "loopback_name": False}

    class Token:
        def __init__(self, folder):
            self.folder, self.text = folder, ""

        def leave(self):
            self.text = "left"
            done.append(("leave", self.folder))

        def problems(self, store, ranks, timeout_seconds):
            done.append(("problems", ranks, timeout_seconds))
            return {0: "full"}

        def remove(self):
            done.append("remove")

    def collective(store, rank, world_size, timeout_seconds):
        done.append(("all-reduce", rank, world_size, timeout_seconds))
        store.set("collective/0", json.dumps(""))
        return "outcome"

    monkeypatch.setattr(exchange, "OutputToken", Token)
    monkeypatch.setattr(exchange, "serve_clock", lambda store, ranks: dict.fromkeys(ranks, 0.5))
    monkeypatch.setattr(probe, "_facts", lambda rank, recipe: own)
    monkeypatch.setattr(probe, "needed_bytes", lambda recipe: 77)
    monkeypatch.setattr(probe, "_try_collective", collective)
    monkeypatch.setattr("xdscale.launch.report.print_report", lambda evidence: found.append(evidence) or 3)

    def lead(answers, recipe, hosts=None):
        store = torch.distributed.HashStore()
        for key, value in answers.items():
            store.set(key, json.dumps(own | value if isinstance(value, dict) else value))
        assert probe._lead(store, 3, recipe, SimpleNamespace(hosts=hosts, timeout=1)) == 3
        return found[-1], done, store

    return lead


RECIPE = SimpleNamespace(output=SimpleNamespace(folder="/runs/x"))


def test_the_first_rank_asks_serves_judges_and_leaves_the_folder_as_it_was(led):
    """Rank 1 is of its machine, rank 2 of another one, where the all-reduce went wrong."""
    answers = {"facts/1": None, "facts/2": {"rank": 2, "host": "b"}, "collective/1": "", "collective/2": "no route"}
    found, done, store = led(answers, RECIPE, "a:2,b:1")
    assert done == [("leave", Path("/runs/x")), ("problems", [0, 2], 1), ("all-reduce", 0, 3, 1), "remove"]
    assert (store.get("token"), store.get("go")) == (b"left", b"go")
    assert (found.names, found.silent, [facts.host for facts in found.hosts]) == (["a", "a", "b"], [], ["a", "b"])
    assert (found.output_folder, found.needed_bytes, found.output_problems) == ("/runs/x", 77, {0: "full"})
    assert (found.clock_offsets, found.collective) == ({2: 0.5, 0: 0.0}, "outcome")
    assert found.collective_problems == {2: "no route"}


def test_where_a_rank_is_silent_the_others_are_told_to_end(led):
    found, done, store = led({"facts/2": {"rank": 2, "host": "b"}}, RECIPE)
    assert done == [("leave", Path("/runs/x")), "remove"]
    assert (found.names, found.silent, store.get("go")) == ([""] * 3, [1], b"stop")
    assert (found.clock_offsets, found.output_problems, found.collective) == ({}, {}, None)


def test_a_rank_that_ends_during_the_all_reduce_is_told(led):
    found, done, store = led({"facts/1": None, "facts/2": None, "collective/2": ""}, None)
    assert found.collective_problems == {1: "ended during the all-reduce"}
    assert (done, store.get("token")) == ([("all-reduce", 0, 3, 1)], b"")
    assert (found.output_folder, found.needed_bytes) == ("", None)
