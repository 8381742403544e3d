"""Hostfile, environment and commands, judged by DeepSpeed's own parsers and by real shells."""

import argparse
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner
from deepspeed.launcher.runner import _parse_hostfile, fetch_hostfile, parse_args
from hypothesis import given, settings
from hypothesis import strategies as st

from xdscale.errors import XdscaleError
from xdscale.launch.environment import carried_environment, deepspeed_env_text, local_cache
from xdscale.launch.hosts import (
    Host,
    first_address,
    hostfile_text,
    hosts_text,
    parse_hosts,
    rank_names,
    read_hostfile,
)
from xdscale.launch.start import Rendezvous, launcher_command, on_one_node, program, with_environment

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True)
HOSTS = st.dictionaries(NAMES, st.integers(1, 16), min_size=1, max_size=5)


@given(HOSTS)
def test_hosts_are_what_deepspeed_reads_from_the_hostfile(machines):
    hosts = parse_hosts(",".join(f"{name}:{slots}" for name, slots in machines.items()))
    assert dict(_parse_hostfile(hostfile_text(hosts).splitlines())) == machines
    assert parse_hosts(hosts_text(hosts)) == hosts
    assert len(rank_names(hosts)) == sum(machines.values())


KINDS_OF_HOSTFILES = {
    "plain": "# two machines\n\nnode-1 slots=8\n  node-2   slots=4\n",
    "users": "ubuntu@10.0.0.1 slots=2\nroot@10.0.0.2 slots=1\n",
    "OpenMPI's": "node-1 slots=2 max_slots=4\nnode-2 slots=2\n",
    "tabs and comments": "node-1\t slots=2\n\tnode_2\tslots=2 # spare\n#node-3 slots=1\n",
    "Windows' lines": "node-1 slots=2\r\n\r\nnode-2.svc.cluster.local slots=2\r\n",
    "no end of line": "localhost slots=2",
    "IPv6": "fe80::1 slots=2\nme@2001:db8::7 slots=1",
}


@pytest.mark.parametrize("kind", KINDS_OF_HOSTFILES)
def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path, kind):
    path = tmp_path / "hostfile"
    path.write_bytes(KINDS_OF_HOSTFILES[kind].encode())
    hosts = read_hostfile(path)
    assert {host.name: host.slots for host in hosts} == dict(fetch_hostfile(str(path)))
    assert dict(_parse_hostfile(hostfile_text(hosts).splitlines())) == dict(fetch_hostfile(str(path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_hostfile(path) == hosts


def test_machines_are_met_without_their_users():
    hosts = parse_hosts("ubuntu@node-1:2,root@10.0.0.2:1")
    assert rank_names(hosts) == ["node-1", "node-1", "10.0.0.2"]
    assert first_address(hosts, None) == "node-1"
    assert first_address(hosts, "head.lan") == "head.lan"
    with pytest.raises(XdscaleError, match="--master-addr"):
        first_address(hosts, "node-1; id")


def test_the_shipped_hostfile_is_read():
    shipped = Path(__file__).parents[2] / "scripts" / "hostfile.example"
    assert read_hostfile(shipped) == [Host("node-1", 8), Host("node-2", 8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node-1 slots=8\nnode-2 8\n", "line 2: 'node-2 8': expected NAME slots=N"),
        ("node-1 slots=8\nnode-1 slots=8\n", "node-1 stands there twice"),
        ("node-1 slots=8 node-2 slots=8\n", "line 1: .*: expected NAME slots=N"),
        (f"node-1 slots={'9' * 5000}\n", "line 1: .*: expected NAME slots=N"),
        ("node-1 slots=0\n", "node-1 has 0 slots"),
        ("root@node-1 slots=1\nnode-1 slots=1\n", "node-1 stands there twice"),
        ("node-[1-4] slots=8\n", r"'node-\[1-4\]' is not a host name"),
        ("-oProxyCommand=x slots=8\n", "is not a host name"),
        ("-l@node-1 slots=8\n", "is not a host name"),
        ("node-1;id slots=8\n", "is not a host name"),
        ("node-1 slots = 2\n", "expected NAME slots=N"),
        ("node-1:2\n", "expected NAME slots=N"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_malformed_hostfile_is_named(tmp_path, text, message):
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(XdscaleError, match=message):
        read_hostfile(path)


def test_a_device_in_the_place_of_a_hostfile_is_not_read():
    """Of others than this one nothing would ever end."""
    with pytest.raises(XdscaleError, match="/dev/null: is a pipe or a device, which may never end; expected a file"):
        read_hostfile(Path("/dev/null"))


@pytest.mark.parametrize(
    "text", ["node-1", "node-1:", "node-1:x", f"node-1:{'9' * 5000}", "node-1:8,,", "-o:8", "a b:8", "a:1,a:1", "a:0"]
)
def test_malformed_hosts_are_refused(text):
    with pytest.raises(XdscaleError, match="--hosts"):
        parse_hosts(text)


def pdsh_runner(*user_arguments):
    options = argparse.Namespace(user_args=list(user_arguments), user_script="x", ssh_port=None)
    return PDSHRunner(options, "")


def through_pdsh(words):
    """What pdsh 2.34 makes of the words it hands on; seen with `pdsh -w a echo %h %%`."""
    known = {"h": "node-1", "u": "me", "n": "0", "%": "%"}
    return re.sub("%(.)", lambda found: known.get(found[1], found[0]), words, flags=re.DOTALL)


def environment_of(*command):
    output = subprocess.run(["env", "-i", *command], capture_output=True, check=True).stdout
    return dict(item.decode().split("=", 1) for item in output.split(b"\0")[:-1])


VALUES = st.text("ab Z09_'\"$`\\\\=,:;&|<>()[]{}*?#!~%hnu^@é\t", max_size=12)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.from_regex(r"NCCL_[A-Z]{1,6}", fullmatch=True), VALUES, min_size=1, max_size=4))
def test_values_arrive_unchanged(tmp_path_factory, values):
    """Through the file, which `deepspeed/launcher/runner.py` reads so and PDSHRunner exports; and without ssh."""
    environment = carried_environment({}, [f"{name}={value}" for name, value in values.items()])
    path = tmp_path_factory.mktemp("env") / ".deepspeed_env"
    path.write_text(deepspeed_env_text(environment))
    runner = pdsh_runner()
    with path.open() as file:
        for line in file.readlines():
            runner.add_export(*line.split("=", maxsplit=1))
    exports = "".join(f"export {key}={value}; " for key, value in runner.exports.items())
    printed = with_environment(["/usr/bin/env", "-0"], environment)
    for script in (through_pdsh(f"{exports} /usr/bin/env -0"), printed):
        found = environment_of("/bin/bash", "-c", script)
        assert {name: found[name] for name in environment} == environment


@pytest.mark.parametrize("value", ["a\nb", "a\n", "a\rb", "a\r"])
def test_a_value_of_several_lines_is_refused_where_the_launcher_takes_one(value):
    with pytest.raises(XdscaleError, match="NCCL_X"):
        deepspeed_env_text({"NCCL_X": value})


def test_what_is_carried():
    found = carried_environment(
        {"HF_HOME": "/hf", "NCCL_SOCKET_IFNAME": "^lo", "HF_TOKEN": "secret", "PATH": "/bin", "OMP_NUM_THREADS": "4"},
        ["OMP_NUM_THREADS=2", "EXTRA=1"],
    )
    assert local_cache()["TRITON_CACHE_DIR"].startswith("/tmp/triton-")
    assert found == {
        "EXTRA": "1",
        "HF_HOME": "/hf",
        "NCCL_SOCKET_IFNAME": "^lo",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with pytest.raises(XdscaleError, match="--env OMP: expected NAME=VALUE"):
        carried_environment({}, ["OMP"])


ARGUMENTS = st.lists(st.text("ab=.,[]{}'* ;&|<>()#?~\"$`\\\\%hn!\n", min_size=1, max_size=8), min_size=1, max_size=4)
TWO = [Host("node-1", 1), Host("node-2", 1)]


@settings(max_examples=60, deadline=None)
@given(ARGUMENTS)
def test_arguments_arrive_unchanged_on_the_other_machine(arguments):
    command = launcher_command(TWO, Path("/hosts"), Rendezvous("node-1", 29500), "xdscale.train", tuple(arguments))
    options = parse_args(command[1:])
    assert (options.hostfile, options.master_addr, options.master_port) == ("/hosts", "node-1", 29500)
    assert (options.user_script, options.module, options.force_multi) == ("xdscale.train", True, True)
    # What pdsh hands to the remote shell: all arguments, joined by blanks.
    line = through_pdsh(" ".join(pdsh_runner(*options.user_args).user_arguments))
    shell = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    assert shell.stdout.split("\0")[:-1] == arguments


@pytest.mark.parametrize("port", [None, 2222])
def test_machines_are_reached_where_their_sshd_listens(port):
    """The launcher and pdsh have ssh's own port where nobody says another one."""
    command = launcher_command(TWO, Path("/hosts"), Rendezvous("node-1", 29500, port), "m", ("a",))
    assert parse_args(command[1:]).ssh_port == port
    alone = launcher_command([Host("localhost", 2)], Path("/hosts"), Rendezvous("localhost", 29500, port), "m", ("a",))
    assert parse_args(alone[1:]).ssh_port is None


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", platform.node()])
def test_this_machine_alone_needs_neither_pdsh_nor_quoting(name):
    arguments = ("a b", "$x")
    command = launcher_command([Host(name, 2)], Path("/hosts"), Rendezvous(name, 29500), "m", arguments)
    options = parse_args(command[1:])
    assert (options.force_multi, options.hostfile, tuple(options.user_args)) == (False, "/hosts", arguments)
    assert (options.no_ssh, options.node_rank) == (True, 0)  # else it tries ssh to this machine first
    # As another user, or beside another machine, ssh is needed.
    for hosts in ([Host(f"other@{name}", 2)], [Host(name, 2), Host("node-2", 2)]):
        assert "--force_multi" in launcher_command(hosts, Path("/hosts"), Rendezvous(name, 29500), "m", arguments)


def test_a_folder_whose_name_the_launcher_would_not_quote_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a b;id").mkdir()
    monkeypatch.chdir(tmp_path / "a b;id")
    with pytest.raises(XdscaleError, match="start from a plain one"):
        launcher_command(TWO, Path("/hosts"), Rendezvous("node-1", 29500), "m", ())


def test_the_line_for_one_machine_is_one_that_deepspeed_takes(tmp_path):
    line = on_one_node(tmp_path / "hosts", {"NCCL_X": "a $b"}, Rendezvous("node-1", 29501), "m", ("a b", "c"))
    program = tmp_path / "deepspeed"
    program.write_text('#!/bin/bash\nprintf \'%s\\0\' "$NCCL_X" "$@"\n')
    program.chmod(0o755)
    launcher = next(word for word in line.split() if word.endswith("deepspeed"))
    script = line.replace(launcher, str(program)).replace("NODE", "1")
    output = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]
    options = parse_args(output[1:])
    assert output[0] == "a $b"
    assert (options.no_ssh, options.node_rank, options.user_args) == (True, 1, ["a b", "c"])


@pytest.mark.parametrize(
    ("beside", "found", "called"),
    [
        (True, "own", "tool"),  # what PATH finds is that of this Python's environment
        (True, "other", "own"),
        (True, None, "own"),
        (False, "other", "tool"),
        (False, None, "own"),
    ],
)
def test_programs_of_this_pythons_environment_are_called_by_what_finds_them(
    tmp_path, monkeypatch, beside, found, called
):
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
    for folder in {"own" if beside else None, found} - {None}:
        (tmp_path / folder / "tool").write_text("")
        (tmp_path / folder / "tool").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "own" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / (found or "nowhere")))
    assert program("tool") == ("tool" if called == "tool" else str(tmp_path / "own" / "tool"))
