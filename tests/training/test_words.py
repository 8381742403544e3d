"""What a process says when nobody listens any more."""

import os
import sys

from xdscale.training.words import outlast_listeners


def test_words_come_line_by_line_and_are_lost_without_harm_once_nobody_can_read_them(monkeypatch):
    listening, end = os.pipe()
    with os.fdopen(end, "w") as stream, os.fdopen(os.dup(end), "w") as replaced:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "__stdout__", stream)
        monkeypatch.setattr(sys, "stderr", replaced)  # by somebody, who has a use for it
        outlast_listeners()
        assert sys.stderr is replaced
        print("step 1")
        assert os.read(listening, 99) == b"step 1\n"  # at once
        os.close(listening)
        print("step 2")
        print("step 3", flush=True)
