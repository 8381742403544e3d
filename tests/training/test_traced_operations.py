"""What a trace remembers of an operation: only what makes new tensors without values, alike each time."""

from types import SimpleNamespace

import pytest
import torch

from xdscale.training.tracing import _Memory

GIVEN = torch.empty(2, 3, device="meta")


class Operation:
    """Stands for one of torch's, which counts how often it is run."""

    def __init__(self, act, alias=None):
        self.runs, self._act, self._overloadpacket = 0, act, object()
        self._schema = SimpleNamespace(arguments=[SimpleNamespace(alias_info=alias)])

    def __call__(self, *arguments, **options):
        self.runs += 1
        return self._act(*arguments)


def new(_, size=6):
    return torch.empty(size, device="meta")


def same_twice(given):
    one = new(given)
    return one, one.view(3, 2)


@pytest.mark.parametrize(
    ("act", "alias", "runs"),
    [
        (new, None, 1),
        (lambda given: (new(given), None, new(given)), None, 1),
        (lambda given: given.view(6), None, 3),  # of the storage that is given
        (same_twice, None, 3),
        (lambda given: new(given, 9)[:6], None, 3),  # holds more than it shows
        (lambda given: torch.zeros(6), None, 3),  # has values
        (lambda given: [new(given)], None, 3),
        (lambda given: 2.0, None, 3),
        (new, "a", 3),  # may write into what it is given
    ],
)
def test_only_operations_that_make_new_tensors_are_not_run_again(act, alias, runs):
    memory, operation = _Memory(), Operation(act, alias)
    found = [memory.run(operation, (GIVEN,), {}) for _ in range(3)]
    assert operation.runs == runs
    assert {flops for _, flops in found} == {0}
    outputs = [[one for one in (output if isinstance(output, (tuple, list)) else [output])] for output, _ in found]
    shapes = [[getattr(one, "shape", one) for one in output] for output in outputs]
    assert shapes[0] == shapes[1] == shapes[2]
    if runs == 1:
        addresses = {one.untyped_storage()._cdata for output in outputs for one in output if one is not None}
        assert len(addresses) == sum(one is not None for output in outputs for one in output)


def test_other_arguments_are_another_operation_and_odd_ones_are_run_each_time():
    memory, operation = _Memory(), Operation(lambda *_: new(None))
    for arguments, runs in (
        ((GIVEN, 1), 1),
        ((GIVEN, 1), 1),
        ((GIVEN, True), 2),  # 1 == True
        ((GIVEN, 1.0), 3),
        ((GIVEN.t(), 1), 4),  # of other strides
        ((GIVEN.half(), 1), 5),
        ((GIVEN, [1, 2]), 6),
        ((GIVEN, [1, 2]), 6),
        ((GIVEN, {"a": 1}), 7),  # cannot be looked up
        ((GIVEN, {"a": 1}), 8),
    ):
        memory.run(operation, arguments, {})
        assert operation.runs == runs
    memory.run(operation, (GIVEN, 1), {"scale": 2})
    assert operation.runs == 9
