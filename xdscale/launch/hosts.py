"""Which machines, and how many ranks on each: `--hosts` and DeepSpeed's hostfile."""

import ipaddress
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from xdscale.errors import XdscaleError
from xdscale.files import open_text

_SLOTS = "[0-9]{1,6}"
# DeepSpeed, too, looks at nothing behind the slots, such as OpenMPI's max_slots. A second machine there would be lost.
_HOSTFILE_LINE = re.compile(rf"(\S+)\s+slots=({_SLOTS})(?:[\s#](?!.*\bslots=).*)?")
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*")


class Host(NamedTuple):
    """A machine.

    Attributes:
        name: what ssh reaches it by, as in node-1 or user@node-1.
        slots: its ranks, one per GPU.
    """

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2]

    @property
    def is_here(self) -> bool:
        """Whether it is this machine, as this user, so that nothing is needed to reach it."""
        return self.name in ("localhost", "127.0.0.1", "::1", platform.node())


def parse_hosts(text: str) -> list[Host]:
    """Reads `node-1:8,node-2:8`.

    Raises:
        XdscaleError: an item is not NAME:SLOTS, or a name stands there twice.
    """
    hosts = []
    for item in text.split(","):
        name, colon, slots = item.strip().rpartition(":")
        if not colon or not re.fullmatch(_SLOTS, slots):
            raise XdscaleError(f"--hosts {text}: {item!r}: expected NAME:RANKS, as in node-1:8,node-2:8")
        hosts.append(Host(name, int(slots)))
    return _checked(hosts, f"--hosts {text}")


def read_hostfile(path: Path) -> list[Host]:
    """Reads a hostfile as DeepSpeed does: lines `[USER@]NAME slots=N …`, empty lines and lines that start with `#`.

    A byte order mark, which DeepSpeed takes for a part of the first name, is left out.

    Raises:
        XdscaleError: no such file, a line of another form (it is named), or a name stands there twice.
    """
    with open_text(path) as file:
        lines = file.read().splitlines()
    hosts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        match = _HOSTFILE_LINE.fullmatch(line.strip())
        if match is None:
            raise XdscaleError(f"{path}, line {number}: {line!r}: expected NAME slots=N, as in 'node-1 slots=8'")
        hosts.append(Host(match[1], int(match[2])))
    return _checked(hosts, str(path))


def one_of(text: str | None, path: Path | None) -> list[Host]:
    """Returns the machines of `--hosts` or `--hostfile`; none when neither is given.

    Raises:
        XdscaleError: both are given, or either is malformed.
    """
    if text is not None and path is not None:
        raise XdscaleError("--hosts and --hostfile: give one of them")
    if text is not None:
        return parse_hosts(text)
    return read_hostfile(path) if path is not None else []


def first_address(hosts: list[Host], given: str | None) -> str:
    """Returns where ranks meet: the address that is given, or that of the first machine, or of this one.

    Raises:
        XdscaleError: what is given is no address; it would reach a shell.
    """
    if given is not None and not _is_address(given):
        raise XdscaleError(f"--master-addr {given!r}: expected a host name or an address")
    return given or (hosts[0].address if hosts else "127.0.0.1")


def hostfile_text(hosts: Iterable[Host]) -> str:
    """Returns the hostfile of these machines, in DeepSpeed's syntax."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def hosts_text(hosts: Iterable[Host]) -> str:
    """Returns the machines in the form of `--hosts`."""
    return ",".join(f"{host.name}:{host.slots}" for host in hosts)


def rank_names(hosts: Iterable[Host]) -> list[str]:
    """Returns the address of each rank's machine, in rank order."""
    return [host.address for host in hosts for _ in range(host.slots)]


def _checked(hosts: list[Host], source: str) -> list[Host]:
    if not hosts:
        raise XdscaleError(f"{source}: names no host; expected at least one")
    for host in hosts:
        user, at, _ = host.name.rpartition("@")
        if (at and not _NAME.fullmatch(user)) or not _is_address(host.address):
            raise XdscaleError(f"{source}: {host.name!r} is not a host name or user@host; name each machine by itself")
        if host.slots < 1:
            raise XdscaleError(f"{source}: {host.name} has {host.slots} slots: expected at least 1")
    names = [host.address for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise XdscaleError(f"{source}: {twice[0]} stands there twice; give each machine once, with all its slots")
    return hosts


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return _NAME.fullmatch(name) is not None
    return True
