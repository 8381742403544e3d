"""What is wrong with a set of machines, and what to do about it: pure judgement on facts."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from xdscale.files import count_of
from xdscale.launch.collective import Outcome
from xdscale.launch.facts import HostFacts

CHECKS = ("answer", "versions", "gpus", "clock", "paths", "space", "environment", "collective")
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb",
    "afs",
    "9p",
    "panfs",
    "wekafs",
    "fuse.",
)

_GIB = 2**30
_LARGEST_CLOCK_OFFSET_SECONDS = 1.0
_LEAST_OPEN_FILES = 4096
_LEAST_SHARED_MEMORY_GIB = 1.0


class Finding(NamedTuple):
    """Something to know about one machine.

    Attributes:
        host: its name in the table.
        check: one of `CHECKS`.
        level: whether training would go wrong, or could.
        text: what was found and what to do.
    """

    host: str
    check: str
    level: Literal["warn", "FAIL"]
    text: str


@dataclass
class Evidence:
    """Everything that was found out.

    Attributes:
        names: of every rank's machine, in rank order; a name that is not known is empty.
        hosts: one for each machine that answered.
        silent: ranks that did not answer in time.
        clock_offsets: seconds ahead of the first machine, by first rank.
        output_folder: where the run will be written, or empty without a recipe.
        output_problems: by first rank, why it cannot write there or is not in the same folder as the first.
        needed_bytes: room that the checkpoints need at once, or None without a recipe.
        collective: what the first rank saw of the all-reduces, or None when they were not tried.
        collective_problems: by rank, what went wrong in them.
    """

    names: list[str]
    hosts: list[HostFacts] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    clock_offsets: dict[int, float] = field(default_factory=dict)
    output_folder: str = ""
    output_problems: dict[int, str] = field(default_factory=dict)
    needed_bytes: int | None = None
    collective: Outcome | None = None
    collective_problems: dict[int, str] = field(default_factory=dict)

    def label(self, rank: int) -> str:
        """Returns what a rank's machine is called, with a rank where its own name does not tell machines apart."""
        if self.names[rank]:
            return self.names[rank]
        if rank in self.silent:
            return "(silent)"
        machine = max((facts for facts in self.hosts if facts.rank <= rank), key=lambda facts: facts.rank)
        same = [facts for facts in self.hosts if facts.host == machine.host]
        return machine.host if len(same) == 1 else f"{machine.host} (rank {machine.rank})"


Trouble = tuple[int, Literal["warn", "FAIL"], str]
"""A rank of a machine, and level and text of a finding there."""


def judge(evidence: Evidence) -> list[Finding]:
    """Returns what is wrong, in the order of `CHECKS`."""
    judges: tuple[Callable[[Evidence], Iterator[Trouble]], ...] = (
        _answer,
        _versions,
        _gpus,
        _clock,
        _paths,
        _space,
        _environment,
        _collective,
    )
    return [
        Finding(evidence.label(rank), check, level, text)
        for check, find in zip(CHECKS, judges)
        for rank, level, text in find(evidence)
    ]


def _answer(evidence: Evidence) -> Iterator[Trouble]:
    silent: dict[str, list[int]] = {}
    for rank in evidence.silent:
        silent.setdefault(evidence.label(rank), []).append(rank)
    for ranks in silent.values():
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        text = f"{which} did not answer: not started, or a firewall between it and the first machine's port; its own "
        yield ranks[0], "FAIL", text + "output says which"


def _versions(evidence: Evidence) -> Iterator[Trouble]:
    for facts in evidence.hosts:
        for name, version in facts.versions.items():
            first = evidence.hosts[0].versions[name]
            if version == "missing":
                yield facts.rank, "FAIL", f"{name} is not installed; install it"
            elif version != first:
                text = f"{name} {version}, the first machine has {first}; install the same on both"
                yield facts.rank, "FAIL", text


def _gpus(evidence: Evidence) -> Iterator[Trouble]:
    first = evidence.hosts[0] if evidence.hosts else None
    for facts in evidence.hosts:
        if not facts.gpus and facts.driver:
            text = f"driver {facts.driver} is loaded but no GPU is usable; check 'nvidia-smi' and CUDA_VISIBLE_DEVICES"
            yield facts.rank, "FAIL", text
        elif facts.gpus and len(facts.gpus) < facts.local_ranks:
            text = f"{facts.local_ranks} ranks for {count_of(len(facts.gpus), 'GPU')}"
            yield facts.rank, "FAIL", f"{text}; ask for as many ranks as there are GPUs"
        if bool(facts.gpus) != bool(first.gpus):
            text = f"{_gpu_names(facts)}, the first machine has {_gpu_names(first)}; use machines of one kind"
            yield facts.rank, "FAIL", text
        elif set(facts.gpus) != set(first.gpus):
            text = f"{_gpu_names(facts)}, the first machine has {_gpu_names(first)}; all wait for the slowest"
            yield facts.rank, "warn", text
        if facts.driver != first.driver:
            text = f"driver {facts.driver or 'none'}, the first machine has {first.driver or 'none'}; install the same"
            yield facts.rank, "warn", text


def _clock(evidence: Evidence) -> Iterator[Trouble]:
    for rank, seconds in evidence.clock_offsets.items():
        if abs(seconds) >= _LARGEST_CLOCK_OFFSET_SECONDS:
            text = f"{seconds:+.1f} s from the first machine's clock; start a time service (chrony, ntpd) on both"
            yield rank, "FAIL", text


def _paths(evidence: Evidence) -> Iterator[Trouble]:
    for facts in evidence.hosts:
        first = evidence.hosts[0].shards_fingerprint
        if facts.shards_problem:
            yield facts.rank, "FAIL", f"data.shards: {facts.shards_problem}; build or copy the shards"
        elif first and facts.shards_fingerprint != first:
            yield facts.rank, "FAIL", "data.shards: not the shards of the first machine; copy them anew"
        if facts.rank in evidence.output_problems:
            text = f"output.folder = {evidence.output_folder}: {evidence.output_problems[facts.rank]}"
            yield facts.rank, "FAIL", text


def _space(evidence: Evidence) -> Iterator[Trouble]:
    for facts in evidence.hosts:
        free = facts.output_free_bytes
        if evidence.needed_bytes and free is not None and free < evidence.needed_bytes:
            text = f"{free / _GIB:.1f} GiB free at {evidence.output_folder}, checkpoints need "
            text += f"{evidence.needed_bytes / _GIB:.1f} GiB; free some, or lower run.keep_checkpoints"
            yield facts.rank, "FAIL", text


def _environment(evidence: Evidence) -> Iterator[Trouble]:
    for facts in evidence.hosts:
        several = len(evidence.names) > facts.local_ranks
        for text in _environment_of_one(facts, several):
            yield facts.rank, "warn", text
        first = evidence.hosts[0].environment
        for name in sorted(first.keys() | facts.environment.keys()):
            here, there = facts.environment.get(name), first.get(name)
            if here != there:
                text = f"{name} is {here or 'not set'}, on the first machine {there or 'not set'}; 'xdscale launch' "
                yield facts.rank, "warn", text + "writes one environment for all"


def _environment_of_one(facts: HostFacts, several: bool) -> Iterator[str]:
    if facts.triton_cache_kind.startswith(NETWORK_FILE_SYSTEMS):
        yield (
            f"Triton's cache {facts.triton_cache} lies on a network file system ({facts.triton_cache_kind}), where "
            "ranks race; set TRITON_CACHE_DIR to a local folder"
        )
    threads = facts.environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) * facts.local_ranks > facts.cores:
        where = f"{count_of(facts.local_ranks, 'rank')} on {count_of(facts.cores, 'core')}"
        yield f"OMP_NUM_THREADS={threads} for {where}; lower it"
    if several and facts.open_files < _LEAST_OPEN_FILES:
        yield f"at most {facts.open_files} open files; raise it: ulimit -n 65536"
    if facts.local_ranks > 1 and facts.shared_memory_gib < _LEAST_SHARED_MEMORY_GIB:
        yield f"/dev/shm has {facts.shared_memory_gib:.2f} GiB; start containers with --shm-size=1g or --ipc=host"
    if several and facts.loopback_name:
        yield (
            f"its own name {facts.host} stands for a loopback address, which other machines cannot reach; mend "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network's interface"
        )


def _collective(evidence: Evidence) -> Iterator[Trouble]:
    for rank, problem in evidence.collective_problems.items():
        text = f"rank {rank}: {problem}; check the firewall between machines, and GLOO_ or NCCL_SOCKET_IFNAME"
        yield rank, "FAIL", text


def _gpu_names(facts: HostFacts) -> str:
    counts = Counter(facts.gpus)
    return ", ".join(f"{count} × {name}" for name, count in counts.items()) or "no GPU"


def table(evidence: Evidence, findings: Sequence[Finding]) -> list[list[str]]:
    """Returns rows of the machine's name and, for each of `CHECKS`, ok, warn, FAIL or - for what was not checked."""
    first_of: dict[str, int] = {evidence.label(facts.rank): facts.rank for facts in evidence.hosts}
    for rank in evidence.silent:
        first_of.setdefault(evidence.label(rank), rank)
    answered = {facts.rank for facts in evidence.hosts}
    return [
        [label] + [_cell(evidence, findings, label, check, rank in answered) for check in CHECKS]
        for label, rank in sorted(first_of.items(), key=lambda item: item[1])
    ]


def _cell(evidence: Evidence, findings: Sequence[Finding], label: str, check: str, answered: bool) -> str:
    levels = {finding.level for finding in findings if finding.host == label and finding.check == check}
    if levels:
        return "FAIL" if "FAIL" in levels else "warn"
    checked = {
        "clock": bool(evidence.clock_offsets),
        "paths": bool(evidence.output_folder),
        "space": evidence.needed_bytes is not None,
        "collective": evidence.collective is not None,
    }.get(check, True)
    return "ok" if checked and (answered or check == "answer") else "-"
