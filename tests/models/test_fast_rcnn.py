"""Fast R-CNN's branch against torchvision's layers, and what of it is trained (spec VL-BERT §1.4, §10)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet101
from torchvision.models.resnet import Bottleneck, ResNet

from xdscale.errors import XdscaleError
from xdscale.models.fast_rcnn import FastRCNN, load_fast_rcnn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    branch = FastRCNN()
    for name, buffer in branch.named_buffers():  # statistics that are not those of the start
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    for name, parameter in branch.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.uniform_(parameter, 0.1, 0.4)
    return branch


def block(states, part, stride=1, dilation=1):
    """A bottleneck, one operation after the other, with the stride in its first convolution."""

    def norm(values, by):
        return F.batch_norm(values, by.running_mean, by.running_var, by.weight, by.bias)

    rest = states
    if part.downsample is not None:
        rest = norm(F.conv2d(states, part.downsample[0].weight, stride=stride), part.downsample[1])
    found = norm(F.conv2d(states, part.conv1.weight, stride=stride), part.bn1).relu()
    found = norm(F.conv2d(found, part.conv2.weight, padding=dilation, dilation=dilation), part.bn2).relu()
    return (norm(F.conv2d(found, part.conv3.weight), part.bn3) + rest).relu()


def bins(features, box):
    """RoIAlign with one sample in the middle of each of 14 × 14 bins, by hand."""
    height, width = features.shape[1:]
    left, top, right, bottom = (side / 16 for side in box)
    rows = top + (torch.arange(14) + 0.5) * max(bottom - top, 1) / 14
    columns = left + (torch.arange(14) + 0.5) * max(right - left, 1) / 14
    out = torch.zeros(len(features), 14, 14)
    for i, y in enumerate(rows.tolist()):
        for j, x in enumerate(columns.tolist()):
            if not (-1 <= y <= height and -1 <= x <= width):
                continue
            y0, x0 = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            low, near = int(y0), int(x0)
            high, far = min(low + 1, height - 1), min(near + 1, width - 1)
            a, b = y0 - low, x0 - near
            out[:, i, j] = (
                features[:, low, near] * (1 - a) * (1 - b) + features[:, low, far] * (1 - a) * b
                + features[:, high, near] * a * (1 - b) + features[:, high, far] * a * b
            )  # fmt: skip
    return out


@pytest.mark.parametrize("masked", [None, "input", "output"])
def test_it_is_a_resnet_with_strides_in_front_a_dilated_end_and_regions(model, masked, monkeypatch):
    """With masks of objects too: the release multiplies what C5 gives, before the mean over 14 × 14 places."""
    masks = (torch.rand(2, 14, 14) > 0.3) & (torch.arange(14) < 11)
    monkeypatch.setattr(model, "masks_at", masked or "output")
    image, boxes = torch.randn(3, 96, 128) * 50, torch.tensor([[8.0, 4, 100, 90], [0, 0, 127, 95]])
    with torch.no_grad():
        states = F.conv2d(image[None], model.conv1.weight, stride=2, padding=3)
        by = model.bn1
        states = F.batch_norm(states, by.running_mean, by.running_var, by.weight, by.bias).relu()
        states = F.max_pool2d(states, 3, 2, 1)
        for layer, stride in ((model.layer1, 1), (model.layer2, 2), (model.layer3, 2)):
            for number, part in enumerate(layer):
                states = block(states, part, stride if number == 0 else 1)
        assert states.shape == (1, 1024, 6, 8)
        regions = torch.stack([bins(states[0], box.tolist()) for box in boxes])
        if masked == "input":
            regions = regions * masks[:, None]
        for part in model.layer4:
            regions = block(regions, part, dilation=2)
        if masked == "output":
            regions = regions * masks[:, None]
        assert regions.shape == (2, 2048, 14, 14)
        wanted = F.avg_pool2d(regions, 14).flatten(1)
        found = model([image], [boxes], None if masked is None else [masks])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


def test_parameters_and_which_of_them_are_trained(model):
    """Spec VL-BERT §1.7: 42,500,160; stages 1 and 2 and all BatchNorm are frozen, also after `train()`."""
    assert sum(parameter.numel() for parameter in model.parameters()) == 42_500_160
    for mode in (True, False, True):
        model.train(mode)
        norms = [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
        assert len(norms) == 104
        assert not any(part.training for part in norms)
        assert model.layer3.training == mode
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model([torch.randn(3, 64, 64)], [torch.tensor([[0.0, 0, 60, 60]])]).sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, parameter in model.named_parameters():
        frozen = (
            name.startswith(("conv1", "layer1")) or ".bn" in name or name.startswith("bn1") or "downsample.1" in name
        )
        assert parameter.requires_grad != frozen, name
        assert (parameter.grad is None) == frozen, name
    model.zero_grad()


def test_images_are_seen_each_by_itself_and_there_may_be_none_to_see(model):
    images = [torch.randn(3, 80, 64), torch.randn(3, 64, 112), torch.zeros(3, 32, 32)]
    boxes = [torch.tensor([[0.0, 0, 60, 70]]), torch.tensor([[5.0, 5, 90, 50], [1, 1, 30, 30]]), torch.zeros(0, 4)]
    with torch.no_grad():
        together, alone = model(images, boxes), [model([image], [mine]) for image, mine in zip(images, boxes)]
    assert [len(part) for part in alone] == [1, 2, 0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    model(images[2:], boxes[2:]).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_weights_of_a_resnet_are_read(tmp_path):
    torch.manual_seed(3)
    published = {name: value for name, value in resnet101(weights=None).state_dict().items()}
    torch.save(published, tmp_path / "resnet101-pt-vgbua-0000.model")
    found = load_fast_rcnn(tmp_path / "resnet101-pt-vgbua-0000.model").state_dict()
    assert published.keys() - found.keys() == {"fc.weight", "fc.bias"}
    for name, value in found.items():
        assert torch.equal(value, published[name]), name
    published.pop("layer3.4.conv2.weight")
    torch.save(published, tmp_path / "torn.model")
    with pytest.raises(XdscaleError, match=r"no fitting weights for layer3\.4\.conv2\.weight of a ResNet-101"):
        load_fast_rcnn(tmp_path / "torn.model")


@pytest.mark.parametrize("shape", [(), (0, 8, 3, 3), (7,), (10**6, 8, 3, 3)])
def test_a_file_that_states_an_odd_width_is_refused(tmp_path, shape):
    """A file of a few bytes may state any shape."""
    state = FastRCNN((1, 1, 1, 1), width=8).state_dict()
    state["layer1.0.conv2.weight"] = torch.zeros(1).expand(shape) if shape else torch.tensor(1.0)
    torch.save(state, tmp_path / "odd.model")
    with pytest.raises(XdscaleError, match=r"odd\.model: holds no fitting weights for "):
        load_fast_rcnn(tmp_path / "odd.model")


def test_a_small_file_that_states_a_vast_resnet_is_refused_before_one_is_made(tmp_path):
    """Of 100 blocks each, 256 wide, it would have 24 GB; random weights would be drawn for it."""
    state = {f"layer{stage}.99.conv1.weight": torch.zeros(1) for stage in range(1, 5)}
    state["layer1.0.conv2.weight"] = torch.zeros(1).expand(256, 1, 1, 1)
    torch.save(state, tmp_path / "vast.model")
    before = torch.get_rng_state()
    with pytest.raises(XdscaleError, match=r"vast\.model: holds no fitting weights for .* and 60\d\d more"):
        load_fast_rcnn(tmp_path / "vast.model")
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_of_batches_may_be_of_any_shape_but_weights_are_numbers(tmp_path):
    state = FastRCNN((1, 1, 1, 1), width=8).state_dict()
    state["bn1.num_batches_tracked"] = torch.zeros(5)
    quantised = {name: value.to(torch.int8) if value.ndim == 4 else value for name, value in state.items()}
    torch.save(quantised, tmp_path / "int8.model")
    with pytest.raises(
        XdscaleError, match=r"int8\.model: holds no fitting weights for conv1\.weight, layer1\.0\.conv1"
    ):
        load_fast_rcnn(tmp_path / "int8.model")
    torch.save(state, tmp_path / "odd.model")
    assert load_fast_rcnn(tmp_path / "odd.model").name == "resnet14"
    for odd in (torch.nan, torch.inf, -torch.inf):
        state["layer2.0.bn1.running_var"][3] = odd
        torch.save(state, tmp_path / "odd.model")
        with pytest.raises(XdscaleError, match=r"layer2\.0\.bn1\.running_var: not all values are finite \(NaN or inf"):
            load_fast_rcnn(tmp_path / "odd.model")
    (tmp_path / "odd.model").write_bytes((tmp_path / "odd.model").read_bytes()[:5000])
    with pytest.raises(XdscaleError, match=r"odd\.model: not a readable weights file: it is damaged or holds other"):
        load_fast_rcnn(tmp_path / "odd.model")


def test_a_file_says_how_deep_and_wide_its_resnet_is(tmp_path):
    """Trained parts and outputs are as of 101 layers; the name says how many there are."""
    torch.manual_seed(3)
    for blocks, width, name in (((3, 4, 6, 3), 64, "resnet50"), ((1, 1, 1, 1), 16, "resnet14")):
        published = ResNet(Bottleneck, list(blocks), width_per_group=width).state_dict()
        torch.save(published, tmp_path / "small.model")
        found = load_fast_rcnn(tmp_path / "small.model")
        assert found.name == name
        assert published.keys() - found.state_dict().keys() == {"fc.weight", "fc.bias"}
        for part, value in found.state_dict().items():
            assert torch.equal(value, published[part]), part
    with torch.no_grad():
        assert found([torch.randn(3, 64, 64)], [torch.tensor([[0.0, 0, 60, 60]])]).shape == (1, 2048)
    assert load_fast_rcnn(None).name == "resnet101"


def test_statistics_stay_wide_beside_weights_in_bf16(model):
    """As DeepSpeed leaves a module in bf16: parameters are narrow, buffers are not."""
    image, boxes = torch.randn(3, 64, 96) * 50, torch.tensor([[8.0, 4, 80, 60]])
    narrow = copy.deepcopy(model)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        wanted = model([image], [boxes])
    found = narrow([image], [boxes])
    assert found.dtype == torch.bfloat16
    assert narrow.bn1.running_var.dtype == torch.float32
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()
    found.sum().backward()
    assert narrow.layer2[0].conv1.weight.grad.any()
