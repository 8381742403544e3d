"""Runs `xdscale.train` several times in one launch, with samples that break the loss or the gradient.

Run by test_non_finite_steps on two ranks. A poisoned sample is one whose batch makes the first
cross-modal layer's output, or the gradient that reaches it, NaN.
"""

import argparse
import functools
import json
import sys

import numpy as np
import torch

from xdscale import train

ALL = -1


def poison(monkeypatch, *, loss=None, gradient=None):
    """Makes every batch with sample `loss` give a NaN loss, and with sample `gradient` a NaN gradient."""
    import xdscale.data.collate
    import xdscale.systems.xdbert

    collate = xdscale.data.collate.XDBERTCollator.__call__
    build = xdscale.systems.xdbert.build_adaptation
    kinds = {"loss": loss, "gradient": gradient}

    def collate_marked(self, slots):
        batch = collate(self, slots)
        ids = slots.sample_ids[slots.real] if self.split.split == "train" else np.empty(0, np.int64)
        marks = [bool(len(ids)) if sample == ALL else sample in ids for sample in kinds.values()]
        batch.arrays["poison"] = np.array(marks, np.int64)
        return batch

    def build_poisoned(recipe):
        module = build(recipe)
        marked = dict.fromkeys(kinds, False)

        def read_marks(module, inputs):
            marked.update(zip(kinds, inputs[0].pop("poison").bool().tolist()))

        def break_output(module, inputs, output):
            language, *others = output
            if marked["loss"]:
                language = language * torch.nan
            if marked["gradient"]:
                language.register_hook(lambda gradient: gradient * torch.nan)
            return (language, *others)

        module.register_forward_pre_hook(read_marks)
        module.model.layers[0].register_forward_hook(break_output)
        return module

    monkeypatch(xdscale.data.collate.XDBERTCollator, "__call__", collate_marked)
    monkeypatch(xdscale.systems.xdbert, "build_adaptation", build_poisoned)


def leave_out(monkeypatch, steps):
    """Makes the trainer go past these steps (counted from 1) without computing anything."""
    from xdscale.training.loop import Trainer

    make = Trainer._step

    @functools.wraps(make)
    def step(self, number):
        if number + 1 not in steps:
            return make(self, number)
        next(self.source)
        return True

    monkeypatch(Trainer, "_step", step)


def main():
    from deepspeed.accelerator import get_accelerator

    # PyTorch computes in fp16 on every CPU; DeepSpeed refuses to where it is not fast.
    get_accelerator().is_fp16_supported = lambda: True
    parser = argparse.ArgumentParser()
    parser.add_argument("runs")
    parser.add_argument("--local_rank")
    for run in json.loads(parser.parse_args().runs):
        changed = []

        def change(owner, name, value, changed=changed):
            changed.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)

        poison(change, loss=run.get("loss"), gradient=run.get("gradient"))
        leave_out(change, run.get("absent", []))
        code = train.main(run["arguments"])
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
