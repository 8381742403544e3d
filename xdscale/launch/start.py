"""Commands that start ranks on several machines through the `deepspeed` launcher."""

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from xdscale.errors import XdscaleError
from xdscale.launch.environment import in_double_quotes
from xdscale.launch.hosts import Host

_PLAIN_PATH = re.compile(r"[\w@+=:,./-]+")


class Rendezvous(NamedTuple):
    """Where ranks meet, and how machines are reached.

    Attributes:
        address: name or address of the first machine, as the others reach it.
        port: a free port there.
        ssh_port: where sshd listens, or None for ssh's default.
    """

    address: str
    port: int
    ssh_port: int | None = None


def program(name: str) -> str:
    """Returns how to call a program of this Python's environment: its bare name where that is what PATH finds."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    # Compared as they are spelt: the python of a virtual environment is a link to one without its packages.
    return name if found and (Path(found) == beside or not beside.exists()) else str(beside)


def launcher_command(
    hosts: list[Host], hostfile: Path, meet: Rendezvous, module: str, arguments: tuple[str, ...]
) -> list[str]:
    """Returns the command that starts every rank from this machine: through pdsh and ssh, unless it is the only one.

    Raises:
        XdscaleError: the launcher would hand this folder's name to other machines' shells, which would not take it.
    """
    module_words = ("--module", module)
    if only_here(hosts):
        # Without --no_ssh the launcher would first try ssh to this machine, as soon as there is a hostfile.
        return [*_launcher(hostfile, meet), "--no_ssh", "--node_rank", "0", *module_words, *arguments]
    here = str(Path.cwd())
    if not _PLAIN_PATH.fullmatch(here):
        raise XdscaleError(f"{here}: the deepspeed launcher cannot pass this folder's name on; start from a plain one")
    ssh_port = ["--ssh_port", str(meet.ssh_port)] if meet.ssh_port else []
    # Without --force_multi a hostfile of one machine would start on this one, whichever it names.
    command = [*_launcher(hostfile, meet), "--force_multi", *ssh_port, *module_words]
    return command + [_through_remote_shell(item) for item in arguments]


def only_here(hosts: list[Host]) -> bool:
    """Returns whether all ranks run on this machine, so that neither pdsh nor ssh is needed."""
    return len(hosts) == 1 and hosts[0].is_here


def on_one_node(
    hostfile: Path, environment: Mapping[str, str], meet: Rendezvous, module: str, arguments: tuple[str, ...]
) -> str:
    """Returns the shell line that starts one machine's ranks there, without ssh; `NODE` is its place in the hostfile.

    The launcher reads `.deepspeed_env` only when it uses ssh, so the line has the variables itself.
    """
    command = [*_launcher(hostfile, meet), "--no_ssh", "--node_rank", "NODE", "--module", module, *arguments]
    return with_environment(command, environment)


def with_environment(command: list[str], environment: Mapping[str, str]) -> str:
    """Returns a command with variables set for it, as a line for a shell."""
    return shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])


def require_ssh() -> None:
    """Checks that what the launcher starts other machines with is installed.

    Raises:
        XdscaleError: pdsh or ssh is not on PATH.
    """
    missing = [name for name in ("pdsh", "ssh") if shutil.which(name) is None]
    if missing:
        raise XdscaleError(
            f"{' and '.join(missing)} not found on PATH: the deepspeed launcher needs pdsh and ssh to reach other "
            "machines; install them (package pdsh), or start each machine with its own '--no_ssh' command, which "
            "'xdscale launch' prints without --run"
        )


def _launcher(hostfile: Path, meet: Rendezvous) -> list[str]:
    return [
        program("deepspeed"),
        "--hostfile",
        str(hostfile),
        "--master_addr",
        meet.address,
        "--master_port",
        str(meet.port),
    ]


def _through_remote_shell(argument: str) -> str:
    """Quotes for pdsh and the shell on the other machine.

    The launcher itself puts what holds a blank between double quotes, in which it escapes nothing but them.
    """
    if " " in argument:
        return in_double_quotes(argument).replace('\\"', '"')
    return shlex.quote(argument).replace("%", "%%")
