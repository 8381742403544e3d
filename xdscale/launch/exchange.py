"""What ranks tell each other through the store: answers, clocks, and a token in the output folder."""

import json
import os
import secrets
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

_CLOCK_ROUNDS = 5
_SECONDS_FOR_A_SHARED_FOLDER = 10.0
"""A network file system may show a new file late."""


def answers(store: Any, topic: str, ranks: Iterable[int], timeout_seconds: float) -> tuple[list[int], dict[int, Any]]:
    """Waits for `topic/RANK` of all ranks, together no longer than `timeout_seconds`.

    Returns:
        Ranks that did not answer, and the values of the others by rank.
    """
    deadline = time.monotonic() + timeout_seconds
    silent, heard = [], {}
    for rank in ranks:
        key = f"{topic}/{rank}"
        try:
            store.wait([key], timedelta(seconds=max(0.1, deadline - time.monotonic())))
        except RuntimeError:
            silent.append(rank)
        else:
            heard[rank] = json.loads(store.get(key))
    return silent, heard


def serve_clock(store: Any, ranks: Iterable[int]) -> dict[int, float]:
    """First rank: answers each rank's requests with its own time and collects what they conclude.

    Returns:
        Seconds that a rank's clock is ahead of this one, by rank.
    """
    offsets = {}
    for rank in ranks:
        for turn in range(_CLOCK_ROUNDS):
            store.get(f"clock/{rank}/{turn}")
            store.set(f"time/{rank}/{turn}", repr(time.time()))
        offsets[rank] = float(store.get(f"offset/{rank}"))
    return offsets


def ask_clock(store: Any, rank: int) -> None:
    """Other ranks: measures the first one's clock. Its answer is taken to lie half-way of the shortest round trip."""
    rounds = []
    for turn in range(_CLOCK_ROUNDS):
        sent = time.time()
        store.set(f"clock/{rank}/{turn}", "")
        theirs = float(store.get(f"time/{rank}/{turn}"))
        received = time.time()
        rounds.append((received - sent, (sent + received) / 2 - theirs))
    store.set(f"offset/{rank}", repr(min(rounds)[1]))


class OutputToken:
    """A file by which machines find out whether they write to the same output folder.

    Args:
        folder: output folder; created for as long as the question lasts, where it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = ""
        self._created: list[Path] = []
        self._problem = ""

    def leave(self) -> None:
        """Writes the first rank's token."""
        text = f".xdscale-doctor-{secrets.token_hex(8)}"
        try:
            self._created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / text).touch()
            self.text = text
        except OSError as error:
            self._problem = f"cannot be written: {error}"

    def problems(self, store: Any, ranks: list[int], timeout_seconds: float) -> dict[int, str]:
        """Returns what is wrong by rank: not writable, or another folder than the first rank's."""
        silent, heard = answers(store, "folder", [rank for rank in ranks if rank], timeout_seconds)
        found = {0: self._problem} if self._problem else {}
        for rank, problem in heard.items():
            if not problem and self.text and not _appears(self.folder / f"{self.text}-{rank}"):
                problem = "what it writes there does not appear on the first machine; put it on a shared file system"
            if problem:
                found[rank] = problem
        return found | {rank: "no answer while looking for the first machine's file there" for rank in silent}

    def remove(self) -> None:
        """Leaves the folder as it was."""
        if self.text:
            for path in self.folder.glob(f"{self.text}*"):
                path.unlink(missing_ok=True)
        for path in self._created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def follow_token(store: Any, rank: int, folder: Path, token: str) -> None:
    """Other ranks: looks for the first rank's token and leaves one beside it."""
    problem = ""
    if token and not _appears(folder / token):
        problem = "not the first machine's folder; put it on a file system that all machines share"
    elif token:
        try:
            (folder / f"{token}-{rank}").touch()
        except OSError as error:
            problem = f"cannot be written: {error}"
    store.set(f"folder/{rank}", json.dumps(problem))


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SECONDS_FOR_A_SHARED_FOLDER
    while time.monotonic() < deadline:
        # Listing makes a network file system ask its server again; looking a name up may not.
        if path.parent.is_dir() and path.name in os.listdir(path.parent):
            return True
        time.sleep(0.2)
    return False
