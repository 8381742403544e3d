"""Judgement on facts that this machine cannot have: GPUs, network file systems, small disks."""

from dataclasses import replace
from pathlib import Path

import pytest

from xdscale.errors import EXIT_BAD_INPUT
from xdscale.launch import facts as facts_module
from xdscale.launch.collective import Outcome
from xdscale.launch.facts import HostFacts, _recipe_facts, existing_parent, file_system
from xdscale.launch.probe import needed_bytes
from xdscale.launch.report import print_report
from xdscale.launch.verdict import CHECKS, Evidence, judge, table
from xdscale.recipe import load_recipe

SOUND = HostFacts(
    rank=0,
    host="gpu-a",
    versions={"python": "3.11.7", "torch": "2.14.1"},
    gpus=["NVIDIA A100"] * 8,
    driver="570.1",
    local_ranks=8,
    cores=64,
    environment={"OMP_NUM_THREADS": "8"},
    triton_cache="/tmp/triton-x",
    triton_cache_kind="ext4",
    open_files=65536,
    shared_memory_gib=64.0,
    loopback_name=False,
    shards_fingerprint="f",
    output_free_bytes=2**40,
)


def evidence(**changes):
    """Two machines of 8 ranks; the second one differs from the first in `changes`."""
    second = replace(SOUND, **({"rank": 8, "host": "gpu-b"} | changes))
    return Evidence(
        names=[""] * 16,
        hosts=[SOUND, second],
        clock_offsets={0: 0.0, 8: 0.2},
        output_folder="/runs/x",
        needed_bytes=2**34,
        collective=Outcome("nccl", 0.1, 10.0, 2**26),
    )


def test_nothing_is_said_of_sound_machines():
    found = evidence()
    assert judge(found) == []
    assert table(found, []) == [[name, *["ok"] * len(CHECKS)] for name in ("gpu-a", "gpu-b")]


@pytest.mark.parametrize(
    ("changes", "check", "level", "text"),
    [
        ({"gpus": ["NVIDIA A100"] * 7}, "gpus", "FAIL", "8 ranks for 7 GPUs"),
        ({"gpus": ["NVIDIA H100"] * 8}, "gpus", "warn", "8 × NVIDIA H100, the first machine has 8 × NVIDIA A100"),
        ({"gpus": [], "driver": ""}, "gpus", "FAIL", "no GPU, the first machine has 8 × NVIDIA A100"),
        ({"gpus": []}, "gpus", "FAIL", "driver 570.1 is loaded but no GPU is usable"),
        ({"driver": "560.2"}, "gpus", "warn", "driver 560.2, the first machine has 570.1"),
        ({"versions": SOUND.versions | {"torch": "missing"}}, "versions", "FAIL", "torch is not installed"),
        ({"shards_fingerprint": "g"}, "paths", "FAIL", "not the shards of the first machine"),
        ({"output_free_bytes": 2**33}, "space", "FAIL", "8.0 GiB free at /runs/x, checkpoints need 16.0 GiB"),
        ({"triton_cache_kind": "nfs4"}, "environment", "warn", "network file system (nfs4)"),
        ({"triton_cache_kind": "fuse.sshfs"}, "environment", "warn", "set TRITON_CACHE_DIR"),
        ({"open_files": 1024}, "environment", "warn", "1024 open files"),
        ({"shared_memory_gib": 0.0625}, "environment", "warn", "/dev/shm has 0.06 GiB"),
        ({"loopback_name": True}, "environment", "warn", "loopback address"),
        ({"environment": {}}, "environment", "warn", "OMP_NUM_THREADS is not set, on the first machine 8"),
        ({"environment": {"OMP_NUM_THREADS": "4,2"}}, "environment", "warn", "is 4,2, on the first machine 8"),
        ({"cores": 32}, "environment", "warn", "OMP_NUM_THREADS=8 for 8 ranks on 32 cores"),
    ],
)
def test_what_is_wrong_with_the_second_machine_is_said_of_it(changes, check, level, text):
    found = evidence(**changes)
    findings = judge(found)
    assert {finding.host for finding in findings} == {"gpu-b"}
    assert any((finding.check, finding.level) == (check, level) and text in finding.text for finding in findings)
    rows = {name: dict(zip(CHECKS, cells)) for name, *cells in table(found, findings)}
    assert rows["gpu-b"][check] == level
    assert set(rows["gpu-a"].values()) == {"ok"}


def test_nothing_is_said_of_a_machine_at_the_limits():
    least = {"output_free_bytes": 2**34, "open_files": 4096, "shared_memory_gib": 1.0, "cores": 64}
    assert judge(evidence(**least)) == []


def test_one_rank_needs_neither_shared_memory_nor_many_files_nor_a_name_that_others_reach():
    alone = replace(SOUND, gpus=["NVIDIA A100"], local_ranks=1, open_files=64, shared_memory_gib=0.01)
    found = Evidence(names=[""], hosts=[replace(alone, loopback_name=True)], clock_offsets={0: 0.0})
    assert judge(found) == []


def test_the_clock_may_be_almost_a_second_off():
    found = evidence()
    found.clock_offsets[8] = -0.99
    assert judge(found) == []
    found.clock_offsets[8] = 1.0
    assert [finding.level for finding in judge(found)] == ["FAIL"]
    found.clock_offsets[8] = -1.5
    (finding,) = judge(found)
    assert (finding.host, finding.check, finding.level) == ("gpu-b", "clock", "FAIL")
    assert "-1.5 s" in finding.text


def test_a_rank_that_fails_in_the_all_reduce_is_found_on_its_machine():
    found = evidence()
    found.collective_problems = {9: "no result of an all-reduce over nccl within 5 s"}
    (finding,) = judge(found)
    assert (finding.host, finding.check, finding.level) == ("gpu-b", "collective", "FAIL")
    assert "rank 9: no result" in finding.text


def test_silent_ranks_are_counted_by_machine():
    found = Evidence(names=["n1"] * 2 + ["n2"] * 2 + ["n3"] * 2, hosts=[SOUND], silent=[2, 3, 5])
    answers = {finding.host: finding.text.split(" did")[0] for finding in judge(found) if finding.check == "answer"}
    assert answers == {"n2": "ranks 2 to 3", "n3": "rank 5"}
    rows = {name: cells for name, *cells in table(found, judge(found))}
    assert rows["n2"] == ["FAIL"] + ["-"] * (len(CHECKS) - 1)


def test_machines_of_one_name_are_told_apart_by_rank():
    found = evidence(host="gpu-a")
    assert [found.label(rank) for rank in (0, 7, 8, 15)] == ["gpu-a (rank 0)"] * 2 + ["gpu-a (rank 8)"] * 2


def told(found, capsys):
    """The exit code, and the lines below the table."""
    code = print_report(found)
    lines = capsys.readouterr().out.splitlines()
    return code, lines[max(number for number, line in enumerate(lines) if not line.strip()) + 1 :]


def test_a_report_says_what_was_measured_what_is_wrong_and_what_to_make_of_it(capsys):
    """16 ranks sum 64 MiB in 10 ms: each sends and receives 2 × 15 / 16 of it."""
    measured = [
        "python 3.11.7, torch 2.14.1",
        "first machine: 8 × NVIDIA A100, driver 570.1; 64 cores; /dev/shm 64.0 GiB",
        "checkpoints need about 16.0 GiB; free: 1024.0 GiB",
        "clocks within 200.0 ms of the first machine's",
        "all-reduce over 16 ranks (nccl): 1 number 0.10 ms, 64 MiB 10.0 ms, bus bandwidth 12.58 GB/s",
    ]
    for seconds in (0.2, -0.2):
        sound = evidence()
        sound.clock_offsets[8] = seconds
        assert told(sound, capsys) == (0, [*measured, "verdict: ok (0 failures, 0 warnings)"])
    code, lines = told(evidence(gpus=["NVIDIA A100"] * 7, open_files=64, driver=""), capsys)
    assert (code, lines[:5]) == (EXIT_BAD_INPUT, measured)
    assert [line.partition(";")[0] for line in lines[5:]] == [
        "FAIL gpu-b, gpus: 8 ranks for 7 GPUs",
        "warn gpu-b, gpus: driver none, the first machine has 570.1",
        "warn gpu-b, environment: at most 64 open files",
        "verdict: FAIL (1 failure, 2 warnings)",
    ]
    # Long lines, and what rich takes for markup, stay as they are.
    many = {f"package-{number}": "1.2.3" for number in range(15)}
    found = evidence(shards_problem="[/data]: missing", loopback_name=True, versions=many)
    found.hosts[0] = replace(SOUND, versions=many)
    _, lines = told(found, capsys)
    assert lines[0] == ", ".join(f"{name} 1.2.3" for name in many)
    assert lines[5] == "FAIL gpu-b, paths: data.shards: [/data]: missing; build or copy the shards"
    assert lines[6].startswith("warn gpu-b, environment: its own name gpu-b stands for a loopback address, which other")
    assert len(lines) == 8
    failed = evidence()
    failed.collective_problems = {9: "no result"}
    assert told(failed, capsys)[1][3].startswith("clocks within")
    assert not any("all-reduce over" in line for line in told(failed, capsys)[1])


def test_a_report_of_one_rank_compares_it_with_nothing(capsys):
    alone = replace(SOUND, gpus=[], driver="", local_ranks=1)
    found = Evidence(names=[""], hosts=[alone], clock_offsets={0: 0.0})
    found.collective = Outcome("gloo", 0.02, 5.25, 2**25)
    assert told(found, capsys)[1] == [
        "python 3.11.7, torch 2.14.1",
        "first machine: no GPU: CPU ranks; 64 cores; /dev/shm 64.0 GiB",
        "all-reduce over 1 rank (gloo): 1 number 0.02 ms, 32 MiB 5.2 ms",
        "verdict: ok (0 failures, 0 warnings)",
    ]


@pytest.mark.parametrize(
    ("own", "meeting", "wrong"),
    [("127.0.1.1", "10.0.0.1", True), ("127.0.1.1", "127.0.0.1", False), ("10.0.0.2", "10.0.0.1", False)],
)
def test_a_machines_own_name_may_be_loopback_only_where_ranks_meet_there(monkeypatch, own, meeting, wrong):
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setattr("socket.gethostbyname", lambda name: meeting if name == "first" else own)
    assert facts_module._name_is_loopback() == wrong


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdb1 /home/local xfs rw 0 0
server:/x /with\\040blank lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/.triton", "nfs4"),
        ("/home/local/cache", "xfs"),
        ("/homely", "ext4"),
        ("/tmp/x", "tmpfs"),
        ("/with blank/x", "lustre"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(path, kind):
    assert file_system(Path(path), MOUNTS) == kind


def test_the_existing_parent_of_a_new_folder(tmp_path):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    assert existing_parent(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("override", "share"),
    [("optim.ema_decay=0.999", 20 / 16), ("optim.optimizer=sgd", 12 / 16), ("training.best=loss/mlm", 5 / 4)],
)
def test_room_for_checkpoints_is_that_of_what_they_hold(override, share):
    """Weights twice, moments, the moving average; of three checkpoints, the one being written, and the best."""
    usual, found = (needed_bytes(load_recipe("quickstart", overrides)) for overrides in ((), (override,)))
    assert found == usual * share


def test_shards_behind_a_url_are_looked_at_there(wiki_shards, tmp_path, monkeypatch):
    """As `data.shards=s3://bucket/wiki run.cache=/disk`; they are no folder of this machine."""
    monkeypatch.setattr("xdscale.shards.remote.PAUSES_SECONDS", ())

    def facts(place):
        return _recipe_facts(load_recipe("quickstart", [f"data.shards=file://{place}", f"run.cache={tmp_path}"]))

    found = facts(wiki_shards)
    assert "shards_problem" not in found
    assert found["shards_fingerprint"]
    assert "/nowhere/dataset.json: cannot be fetched" in facts("/nowhere")["shards_problem"]


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        ("NVRM version: NVIDIA Kernel Module  570.133.20  Sun Mar 30 2025\nGCC version:  gcc 12.2.0\n", "570.133.20"),
        (None, ""),
    ],
)  # fmt: skip
def test_nvidias_driver_is_that_which_the_kernel_has_loaded(tmp_path, monkeypatch, text, driver):
    if text is not None:
        (tmp_path / "version").write_text(text)
    places = {"/proc/driver/nvidia/version": tmp_path / "version"}
    monkeypatch.setattr(facts_module, "Path", places.__getitem__)
    assert facts_module._driver() == driver


def test_a_report_begins_with_a_table_of_machines_and_checks(capsys):
    print_report(evidence(host="a-machine-with-quite-a-long-name-that-nobody-cuts", driver="", open_files=64))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip() and "─" not in line]
    assert rows[0] == ["host", *CHECKS]
    assert rows[1] == ["gpu-a", *["ok"] * len(CHECKS)]
    levels = {"gpus": "warn", "environment": "warn"}
    assert rows[2] == ["a-machine-with-quite-a-long-name-that-nobody-cuts", *(levels.get(one, "ok") for one in CHECKS)]
