"""Hostfile, environment and commands, judged by DeepSpeed's own parsers and by real shells."""

import argparse
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import _parse_hostfile, parse_args
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.launch.environment import carried_environment, deepspeed_env_text
from xdscale.launch.hosts import Host, hostfile_text, hosts_text, parse_hosts, rank_names, read_hostfile
from xdscale.launch.start import Rendezvous, on_one_node, over_ssh

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
HOSTS = st.dictionaries(NAMES, st.integers(1, 16), min_size=1, max_size=5)
VALUES = st.text("abzABZ019_@%+=:,./^-", max_size=12)


@given(HOSTS)
def test_hosts_are_what_deepspeed_reads_from_the_hostfile(machines):
    hosts = parse_hosts(",".join(f"{name}:{slots}" for name, slots in machines.items()))
    assert dict(_parse_hostfile(hostfile_text(hosts).splitlines())) == machines
    assert parse_hosts(hosts_text(hosts)) == hosts
    assert len(rank_names(hosts)) == sum(machines.values())


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# two machines\n\nnode-1 slots=8\n  node-2   slots=4\n")
    assert {host.name: host.slots for host in read_hostfile(path)} == dict(
        _parse_hostfile(path.read_text().splitlines())
    )
    shipped = Path(__file__).parents[2] / "scripts" / "hostfile.example"
    assert read_hostfile(shipped) == [Host("node-1", 8), Host("node-2", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=8\nnode-2 8\n", "line 2: 'node-2 8': expected NAME slots=N"),
        ("node-1 slots=8\nnode-1 slots=8\n", "node-1 stands there twice"),
        ("node-1 slots=0\n", "node-1 has 0 slots"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_named(tmp_path, text, message):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(XdscaleError, match=message):
        read_hostfile(path)


@pytest.mark.parametrize("text", ["node-1", "node-1:", "node-1:x", "node-1:8,,", "-o:8", "a b:8", "a:1,a:1", "a:0"])
def test_malformed_hosts_are_refused(text):
    with pytest.raises(XdscaleError, match="--hosts"):
        parse_hosts(text)


def pdsh_runner(*user_arguments):
    options = argparse.Namespace(user_args=list(user_arguments), user_script="x", ssh_port=None)
    return PDSHRunner(options, "")


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.from_regex(r"NCCL_[A-Z]{1,6}", fullmatch=True), VALUES, min_size=1, max_size=4))
def test_values_arrive_unchanged_through_the_launcher_and_through_sourcing(values):
    """The file is read line by line as `deepspeed/launcher/runner.py` does, then exported as PDSHRunner does."""
    environment = carried_environment(values)
    text = deepspeed_env_text(environment)
    runner = pdsh_runner()
    for line in text.splitlines(keepends=True):
        runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    for script in (exports, f"set -a\n{text}"):
        shell = subprocess.run(
            ["env", "-i", "/bin/bash", "-c", f"{script}\n/usr/bin/env"], capture_output=True, text=True, check=True
        )
        found = dict(line.split("=", 1) for line in shell.stdout.splitlines())
        assert {name: found[name] for name in environment} == environment


@pytest.mark.parametrize("value", ["a b", "$HOME", "`id`", 'x"y', "a;b", "a\nb", "~/x", "*"])
def test_a_value_that_a_shell_would_change_is_refused(value):
    with pytest.raises(XdscaleError, match="NCCL_X"):
        carried_environment({"NCCL_X": value})


def test_what_is_carried():
    found = carried_environment(
        {"HF_HOME": "/hf", "NCCL_SOCKET_IFNAME": "^lo", "HF_TOKEN": "secret", "PATH": "/bin", "OMP_NUM_THREADS": "4"},
        ["OMP_NUM_THREADS=2", "EXTRA=1"],
    )
    assert found.pop("TRITON_CACHE_DIR").startswith("/tmp/triton-")
    assert found == {
        "EXTRA": "1",
        "HF_HOME": "/hf",
        "NCCL_SOCKET_IFNAME": "^lo",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with pytest.raises(XdscaleError, match="--env OMP: expected NAME=VALUE"):
        carried_environment({}, ["OMP"])


ARGUMENTS = st.lists(st.text("ab=.,[]{}'* ;&|<>()#?~", min_size=1, max_size=8), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(ARGUMENTS)
def test_arguments_arrive_unchanged_on_the_other_machine(arguments):
    command = over_ssh(Path("/hosts"), Rendezvous("node-1", 29500), "xdscale.adapt", tuple(arguments))
    options = parse_args(command[1:])
    assert (options.hostfile, options.master_addr, options.master_port) == ("/hosts", "node-1", 29500)
    assert (options.user_script, options.module, options.force_multi) == ("xdscale.adapt", True, True)
    # What pdsh hands to the remote shell: all arguments, joined by blanks.
    line = " ".join(pdsh_runner(*options.user_args).user_arguments)
    shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout.split("\0")[:-1] == arguments


def test_an_argument_that_cannot_pass_is_refused():
    with pytest.raises(XdscaleError, match="cannot pass through pdsh"):
        over_ssh(Path("/hosts"), Rendezvous("node-1", 29500), "xdscale.adapt", ("data.shards=/a b/$x",))


def test_the_line_for_one_machine_is_one_that_deepspeed_takes(tmp_path):
    line = on_one_node(tmp_path / "hosts", tmp_path / "e n v", Rendezvous("node-1", 29501), "m", ("a b", "c"))
    (tmp_path / "e n v").write_text("NCCL_X=1\n")
    program = tmp_path / "deepspeed"
    program.write_text('#!/bin/bash\nprintf \'%s\\0\' "$NCCL_X" "$@"\n')
    program.chmod(0o755)
    words = line.split()
    launcher = next(word for word in words if word.endswith("deepspeed"))
    script = line.replace(launcher, str(program)).replace("NODE", "1")
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    options = parse_args(output[1:])
    assert output[0] == "1"
    assert (options.no_ssh, options.node_rank, options.user_args) == (True, 1, ["a b", "c"])
