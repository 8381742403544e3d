"""Pickles that would run programs, take all memory, or are none."""

import io
import os
import pickle
import subprocess

import numpy as np


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(chance, canary, inside=None):
    """A pickle that would make the file `canary`, take all memory, or call what it must not; `inside` a valid one."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w')"
    calls = [
        _Call(os.system, touch),
        _Call(eval, code),
        _Call(exec, code),
        _Call(subprocess.Popen, ["touch", str(canary)]),
        _Call(open, str(canary), "w"),
        _Call(getattr, "x", "format"),
        _Call(__import__, "os"),
        _Call(os.mkdir, str(canary)),
        _Call(np.save, str(canary), 1),
        _Call(np.fromfile, "/etc/passwd"),
        _Call(bytearray, 10**15),
        _Call(range, 10),
        _Call(io.BytesIO, b"x"),
    ]
    raw = [
        b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        b"cbuiltins\neval\n(S'" + code.encode().replace(b"'", b'"') + b"'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}S'x'\nK\x01s\x86b.",
        b"\x80\x04K\x01r\xff\xff\xff\xff.",
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x10\x00\x00.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
        b"\x80\x02Pa persistent id\n.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02" + b"(" * 3000 + b"t" * 2999 + b".",
        b"\x80\x02cnumpy\ndtype\n(S'O8'\nK\x00K\x01tR.",
        b"\x80\x02cnumpy\ndtype\n(S'V8'\nK\x00K\x01tR.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01\x8a\x06\xff\xff\xff\xff\xff\x7f\x85"
        b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR\x89U\x08abcdefghtb.",
        b"\x80\x02c__main__\nMissing\n.",
        b"\x80\x02ccollections\nOrderedDict\n}S'__class__'\nNs\x86b.",
        b"",
        b"not a pickle",
        b"\x80\x63.",
    ]
    kind = int(chance.integers(len(calls) + len(raw)))
    if kind >= len(calls):
        return raw[kind - len(calls)]
    protocol = int(chance.integers(6))
    if inside is None or chance.random() < 0.3:
        return pickle.dumps(calls[kind], protocol)
    places = list(inside)
    return pickle.dumps(inside | {places[chance.integers(len(places))]: calls[kind]}, protocol)
