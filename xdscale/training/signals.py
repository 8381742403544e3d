"""SIGTERM and SIGUSR1: finish the step, save, end with a documented exit code."""

import signal
from types import FrameType


class StopRequest:
    """Remembers that this rank was asked to stop; the loop spreads the news to the other ranks.

    The DeepSpeed launcher signals ranks one after another, so a rank never acts alone: the loop adds `requested` to
    the numbers that all ranks sum in every step.
    """

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """Catches SIGTERM and SIGUSR1 from now on."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGUSR1, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
