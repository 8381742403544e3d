"""Spares Triton's interpreter what it does again and again for nothing."""

from collections.abc import Iterator

import pytest
import triton


@pytest.fixture(scope="session", autouse=True)
def _languages_once() -> Iterator[None]:
    """At each call of a jitted function from another one, the interpreter makes the language its own once more.

    It goes through all of `triton.language` for that and takes nothing back: the first call of each function does.
    """
    if not triton.knobs.runtime.interpret:
        yield
        return
    from triton.runtime import interpreter

    ready = set()

    def call(self, *arguments: object, **options: object) -> object:
        if self.fn not in ready:
            ready.add(self.fn)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
