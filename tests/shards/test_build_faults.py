"""Building shards while the disk fills up or the process is killed, at every operation on files.

After each fault the folder must hold nothing wrong: every tar under its final name is whole, `dataset.json` is there
only with all of its shards. Started again, the build must end in the same bytes as one that was never disturbed.

The short form (the test suite) fills the disk at every operation of a whole build; of building in parts and of
overwriting, and for kills, it takes a seeded sample of them. The long form takes every operation of all, and more
rounds of several faults each:

    XDSCALE_CHAOS_ROUNDS=200 pytest tests/shards/test_build_faults.py

`XDSCALE_CHAOS_SEED` (default 0) chooses the sample and the rounds; a failure names its seed.
"""

import contextlib
import functools
import hashlib
import os
import random
import resource
import shutil
import subprocess
import sys
import time

import pytest

from xdscale.errors import XdscaleError
from xdscale.shards.build import merge_parts
from xdscale.shards.verify import verify_shards
from xdscale.shards.workplace import Part

from . import faults

ROUNDS = int(os.environ.get("XDSCALE_CHAOS_ROUNDS", "8"))
SEED = int(os.environ.get("XDSCALE_CHAOS_SEED", "0"))
SCENARIOS = ("whole", "parts", "overwrite")


pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def build(small_build):
    return functools.partial(small_build, shard_text_bytes=12_000)


@pytest.fixture(scope="module")
def expected(build, tmp_path_factory):
    """Digests of the undisturbed dataset: three or more units of both splits."""
    out = tmp_path_factory.mktemp("expected") / "out"
    build(out)
    found = digests(out)
    assert sum(name.startswith("train") for name in found) >= 3
    return found


@pytest.fixture(scope="module")
def earlier(build, tmp_path_factory):
    """Another dataset, which the scenario "overwrite" finds in its folder."""
    out = tmp_path_factory.mktemp("earlier") / "out"
    build(out, sequence_length=40)
    return out


@pytest.fixture(scope="module")
def operations(build, earlier, tmp_path_factory):
    """The kinds of operations of each scenario, undisturbed."""
    found = {}
    for name in SCENARIOS:
        out = prepared(name, earlier, tmp_path_factory.mktemp("count") / "out")
        found[name] = faults.count_operations(out.parent, lambda out=out, name=name: perform(name, build, out))
    return found


def prepared(scenario, earlier, out):
    out.parent.mkdir(exist_ok=True)
    if scenario == "overwrite":
        shutil.copytree(earlier, out)
    return out


def perform(scenario, build, out):
    """One start of what the user would start again; each of its commands goes on where it was stopped."""
    if scenario == "parts":
        build(out, part=Part(1, 2))
        build(out, part=Part(0, 2))
        merge_parts(out)
    else:
        build(out, overwrite=scenario == "overwrite")


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def check_state(out, expected, earlier):
    """Nothing under a final name is torn or alone."""
    if not out.exists():
        return
    whole = {(name, digest) for known in (expected, digests(earlier)) for name, digest in known.items()}
    for path in out.iterdir():
        if path.suffix == ".tar":
            assert (path.name, hashlib.sha256(path.read_bytes()).hexdigest()) in whole, f"{path.name} is torn"
    if (out / "dataset.json").exists():
        verify_shards(out)


def message_of(action):
    with pytest.raises(XdscaleError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_disk_is_full_at_any_operation(scenario, build, expected, earlier, operations, tmp_path):
    kinds = operations[scenario]
    points = [number for number, kind in enumerate(kinds, start=1) if kind in faults.NEEDS_SPACE]
    assert set(kinds) >= set(faults.NEEDS_SPACE)
    assert len(points) > 50
    if scenario != "whole" and len(points) > 4 * ROUNDS:
        points = random.Random(f"{SEED} {scenario}").sample(points, 4 * ROUNDS)
    for number in points:
        out = prepared(scenario, earlier, tmp_path / f"{number}" / "out")
        action = functools.partial(perform, scenario, build, out)
        message = message_of(functools.partial(faults.run_with, out.parent, number, faults.disk_full, action))
        assert "No space left on device" in message, (number, kinds[number - 1])
        assert "\n" not in message
        assert not list(out.glob("**/.*.partial")), (number, kinds[number - 1])
        check_state(out, expected, earlier)
        action()
        assert digests(out) == expected, (number, kinds[number - 1])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_operation(scenario, build, expected, earlier, operations, tmp_path):
    kinds = operations[scenario]
    chance = random.Random(f"{SEED} {scenario}")
    for number in chance.sample(range(1, len(kinds) + 1), min(ROUNDS, len(kinds))):
        out = prepared(scenario, earlier, tmp_path / f"{number}" / "out")
        action = functools.partial(perform, scenario, build, out)
        where = (SEED, number, kinds[number - 1])
        assert faults.run_killed(out.parent, number, action), where
        check_state(out, expected, earlier)
        action()
        assert digests(out) == expected, where


def test_fault_after_fault(build, expected, earlier, operations, tmp_path):
    """One folder, up to six faults of both kinds in a row, then a start that nothing disturbs."""
    for number in range(max(1, ROUNDS // 4)):
        seed = f"{SEED} round {number}"
        chance = random.Random(seed)
        scenario = chance.choice(SCENARIOS)
        out = prepared(scenario, earlier, tmp_path / f"{number}" / "out")
        action = functools.partial(perform, scenario, build, out)
        for _ in range(chance.randint(2, 6)):
            at = chance.randint(1, len(operations[scenario]))
            if chance.random() < 0.5:
                faults.run_killed(out.parent, at, action)
            else:
                with contextlib.suppress(XdscaleError, OSError):  # OSError: when it is a removal's turn
                    faults.run_with(out.parent, at, faults.disk_full, action)
            check_state(out, expected, earlier)
        action()
        assert digests(out) == expected, seed


def command(corpus, out):
    options = "--language-tokenizer package:cognition/model --sequence-length 30 --clip-blocks 1 --workers 2".split()
    call = "from xdscale.cli import main; main()"
    return [sys.executable, "-c", call, "shards", "build", str(corpus), "--out", str(out), *options]


@pytest.mark.parametrize("number", range(max(1, ROUNDS // 8)))
def test_two_workers_killed_at_any_time(number, small_corpus, tmp_path):
    """The parent alone is killed; its workers must end by themselves and leave nothing torn."""
    chance = random.Random(f"{SEED} time {number}")
    plain, out = tmp_path / "plain", tmp_path / "out"
    started = time.monotonic()
    subprocess.run(command(small_corpus, plain), check=True, capture_output=True)
    seconds = time.monotonic() - started
    expected = digests(plain)
    for _ in range(2):
        process = subprocess.Popen(command(small_corpus, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        time.sleep(chance.uniform(0.2, 1) * seconds)
        process.kill()
        process.communicate()  # until the workers, who hold the pipe too, have ended
        check_state(out, expected, plain)
    subprocess.run(command(small_corpus, out), check=True, capture_output=True)
    assert digests(out) == expected


def test_a_limit_of_the_system_in_two_workers(small_corpus, tmp_path):
    """The system itself refuses to write on: the workers' error reaches the user as one message."""
    out = tmp_path / "out"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = subprocess.run(command(small_corpus, out), preexec_fn=limited, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {out}: cannot be written: File too large; finished shards are kept")
    assert len(result.stderr.splitlines()) == 1
    assert not list(out.glob("*.tar"))
    assert not list(out.glob(".*.partial"))
    subprocess.run(command(small_corpus, out), check=True, capture_output=True)
    verify_shards(out)
