"""Commands that start ranks on several machines through the `deepspeed` launcher."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from xdscale.errors import XdscaleError


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


def over_ssh(hostfile: Path, meet: Rendezvous, module: str, arguments: tuple[str, ...]) -> list[str]:
    """Returns the command that starts every rank from one machine, through pdsh and ssh.

    Raises:
        XdscaleError: an argument that pdsh's second shell would change and the launcher cannot quote.
    """
    ssh_port = ["--ssh_port", str(meet.ssh_port)] if meet.ssh_port else []
    # Without --force_multi a hostfile of one machine would start on this one, whichever it names.
    return [
        *_launcher(hostfile, meet),
        "--force_multi",
        *ssh_port,
        "--module",
        module,
        *(_through_remote_shell(item) for item in arguments),
    ]


def on_one_node(
    hostfile: Path, environment_file: Path, meet: Rendezvous, module: str, arguments: tuple[str, ...]
) -> str:
    """Returns the shell line that starts one machine's ranks there, without ssh; `NODE` is its place in the hostfile.

    The launcher reads `.deepspeed_env` only when it uses ssh, so the line sources it.
    """
    command = [*_launcher(hostfile, meet), "--no_ssh", "--node_rank", "NODE", "--module", module, *arguments]
    return f"(set -a; . {shlex.quote(str(environment_file))}; {shlex.join(command)})"


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
    """Quotes for the shell on the other machine; the launcher itself only quotes what holds a blank."""
    if " " not in argument:
        return shlex.quote(argument)
    if any(character in argument for character in '$`\\"!'):
        raise XdscaleError(f"argument {argument!r}: cannot pass through pdsh; write this value into a recipe file")
    return argument
