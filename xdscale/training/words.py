"""What a process says while it runs: whoever listens may go before it ends."""

import io
import sys


class _Lasting(io.FileIO):
    """Where words are lost, and nothing else, once nobody can read them."""

    def write(self, data: bytes | bytearray | memoryview) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlast_listeners() -> None:
    """Lets `print` succeed when the terminal was closed, or the program behind a pipe has ended.

    Ctrl-C also ends the `tee` of `xdscale train … 2>&1 | tee words`, while the ranks still have a checkpoint to save
    and say so. What cannot be said must not cost a run; `log.jsonl` holds it anyway. A stream that somebody replaced
    stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        lasting = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
        text = io.TextIOWrapper(lasting, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        setattr(sys, name, text)
