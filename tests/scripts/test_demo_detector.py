"""The small detector of the demo from pixels."""

import importlib.util
from pathlib import Path

import torch
from torch import nn

_spec = importlib.util.spec_from_file_location("demo_detector", Path(__file__).parents[2] / "scripts/demo_detector.py")
demo_detector = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(demo_detector)


def test_batch_norm_learns_the_statistics_that_it_then_keeps():
    torch.manual_seed(0)
    model, pictures = demo_detector.BoxClassifier(3), torch.randn(4, 3, demo_detector.SIDE, demo_detector.SIDE) * 50
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    with torch.no_grad():
        model(pictures)
        assert not any(map(torch.equal, before, (norm.running_mean for norm in norms)))
        model.eval()
        torch.testing.assert_close(model(pictures)[:1], model(pictures[:1]), atol=1e-5, rtol=1e-4)
