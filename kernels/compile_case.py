"""One kernel in one shipped configuration, described so that it can be compiled without a GPU."""

from dataclasses import dataclass

import torch

from xdscale.kernels.gpu import Launch

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    int: "i32",
    float: "fp32",
}
"""Triton's names of dtypes and of Python's numbers."""


@dataclass(frozen=True)
class CompileCase:
    """What `triton.compile` needs to build a kernel ahead of time, and what the launch costs at a true shape.

    Attributes:
        operation: the public operation that launches the kernel.
        name: kernel, dtype and shape of this configuration, unique within the operation and target.
        kernel: the `triton.JITFunction`.
        signature: type of each runtime argument and "constexpr" for the others, in the kernel's order.
        divisible_by_16: names of the runtime arguments that the launcher specialises as multiples of 16
            (attribute tt.divisibility): addresses in bytes, integers in their own unit.
        constexprs: value of each compile-time argument.
        num_warps: warps (wavefronts on gfx942) per program.
        num_stages: stages of the software pipeline.
        target: "sm_80", "sm_90", "sm_100" or "gfx942".
        bytes_moved: memory traffic of one launch at the true shape; what programs that run at the same time
            read together counts once (it stays in the L2 cache).
        lower_bound_bytes: every input of the launch read once and every result written once, without the
            partial sums that splitting the work costs.
        flops: multiplications and additions of the matrix product in one launch.
    """

    operation: str
    name: str
    kernel: object
    signature: dict[str, str]
    divisible_by_16: tuple[str, ...]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    target: str
    bytes_moved: int
    lower_bound_bytes: int
    flops: int


def compile_case(
    launch: Launch, target: str, operation: str, name: str, *, moved: int, least: int, flops: int = 0
) -> CompileCase:
    """Returns the case of a launch on the meta device; attributes as of `CompileCase`."""
    constexprs = dict(launch.options)
    resources = {name: constexprs.pop(name) for name in ("num_warps", "num_stages")}
    signature, divisible = {}, []
    for parameter, value in zip(launch.kernel.params, launch.arguments):
        pointer = isinstance(value, torch.Tensor)
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if pointer else TYPES[type(value)]
        specialised = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        # Tensors of their own begin at multiples of 16 bytes; kernels say which ones may be parts of others.
        if specialised and (pointer or (isinstance(value, int) and value % 16 == 0)):
            divisible.append(parameter.name)
    return CompileCase(
        operation,
        name,
        launch.kernel,
        signature | dict.fromkeys(constexprs, "constexpr"),
        tuple(divisible),
        constexprs,
        **resources,
        target=target,
        bytes_moved=moved,
        lower_bound_bytes=least,
        flops=flops,
    )
