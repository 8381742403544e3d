"""r2c's branch of ResNet-50 against torchvision's own layers, put together as its release does (spec VisualBERT §4)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import RoIAlign

from xdscale.errors import XdscaleError
from xdscale.models.r2c import R2CDetector, load_detector

SIZE = 24


class Released(nn.Module):
    """A stock ResNet in the release's order, under its names, on a batch of images of one size."""

    def __init__(self, blocks=(1, 1, 2, 2), width=16):
        super().__init__()
        net = ResNet(Bottleneck, list(blocks), width_per_group=width)
        for stage in (net.layer2, net.layer3):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
        net.layer4[0].conv2.stride = net.layer4[0].downsample[0].stride = (1, 1)
        self.backbone = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3)
        self.after_roi_align = nn.Sequential(net.layer4, nn.AvgPool2d(7, stride=1), nn.Flatten())
        self.mask_upsample = nn.Conv2d(1, 32, kernel_size=3, stride=2, padding=1, bias=True)
        self.object_embed = nn.Embedding(81, 128)
        self.obj_downsample = nn.Sequential(nn.Dropout(0.1), nn.Linear(2048 + 128, SIZE), nn.ReLU())
        self.regularizing_predictor = nn.Linear(2048, 81)
        self.roi_align = RoIAlign((7, 7), spatial_scale=1 / 16, sampling_ratio=0)

    def forward(self, images, boxes, masks, classes):
        """Rows of boxes begin with the number of their image."""
        states = self.roi_align(self.backbone(images), boxes)
        states[:, :32] += self.mask_upsample(masks[:, None].to(states.dtype) - 0.5)
        seen = self.after_roi_align(states)
        return self.obj_downsample(torch.cat((seen, self.object_embed(classes)), -1))


@pytest.fixture(scope="module")
def released():
    torch.manual_seed(0)
    module = Released().eval()
    for name, buffer in module.named_buffers():  # statistics that are not those of the start
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.8, 1.2)
    for name, parameter in module.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.uniform_(parameter, 0.1, 0.4)
    return module


@pytest.fixture
def path(released, tmp_path):
    """A checkpoint of the release, with its BERT beside the branch."""
    state = {f"detector.{name}": value for name, value in released.state_dict().items()}
    torch.save(state | {"bert.bert.pooler.dense.bias": torch.zeros(8)}, tmp_path / "best.th")
    return tmp_path / "best.th"


def drawn(dtype=torch.float32):
    """Two images, of three and one boxes, with masks and classes of each."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, 96, 128, dtype=dtype)
    boxes = [torch.tensor([[0.0, 0, 127, 95], [8, 4, 100, 90], [30, 50, 41, 57]]), torch.tensor([[5.0, 6, 60, 80]])]
    masks = [torch.rand(len(one), 14, 14) > 0.4 for one in boxes]
    return images, boxes, masks, [torch.tensor([0, 1, 80]), torch.tensor([17])]


def test_features_are_those_of_the_release(released, path):
    """In fp64, for a whole image and for boxes of several and of less than one place of C4's map."""
    model = load_detector(path, size=SIZE, dropout=0.1).double().eval()
    images, boxes, masks, classes = drawn(torch.float64)
    rois = torch.cat([F.pad(one, (1, 0), value=number) for number, one in enumerate(boxes)]).double()
    with torch.no_grad():
        wanted = released.double()(images, rois, torch.cat(masks), torch.cat(classes))
        found = model(list(images), boxes, masks, classes)
        other = model(list(images), boxes, [~mask for mask in masks], classes)
    released.float()
    assert (wanted > 0).float().mean() > 0.2
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert (other - found).abs().max() > 1e-3


@pytest.mark.parametrize("freeze", [False, True])
def test_all_is_trained_but_statistics_and_what_is_frozen(path, freeze):
    model = load_detector(path, size=SIZE, dropout=0.1)
    if freeze:
        model.freeze_maps()
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images, *rest = drawn()
    model(list(images), *rest).square().sum().backward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, parameter in model.named_parameters():
        stays = freeze and name.startswith(("conv1", "bn1", "layer1", "layer2", "layer3"))
        assert (parameter.grad is None) == stays, name
        assert stays or parameter.grad.any(), name


def test_parameters_are_those_of_a_resnet_50_and_of_what_r2c_adds():
    """torchvision has 25,557,032 of which 2,049,000 are its classifier's; 10,368 + 320 + 1,114,624 are r2c's."""
    with torch.device("meta"):
        model = R2CDetector(size=512, dropout=0.1)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 25_557_032 - 2_049_000 + 81 * 128 + 32 * 10 + 2177 * 512


def test_a_resnet_50_gives_the_trunk_alone(tmp_path):
    published = resnet50(weights=None).state_dict()
    torch.save(published, tmp_path / "resnet50.pth")
    found = load_detector(tmp_path / "resnet50.pth", size=SIZE, dropout=0.1).state_dict()
    new = {"masks.weight", "masks.bias", "classes.weight", "projection.weight", "projection.bias"}
    assert found.keys() - published.keys() == new
    for name in found.keys() & published.keys():
        assert torch.equal(found[name], published[name]), name
    torch.save(
        {name: value for name, value in published.items() if "layer4.2.conv3" not in name}, tmp_path / "torn.pth"
    )
    with pytest.raises(XdscaleError, match=r"no fitting weights for layer4\.2\.conv3\.weight of a ResNet-50 or its"):
        load_detector(tmp_path / "torn.pth", size=SIZE, dropout=0.1)


def test_a_branch_that_was_trained_for_other_features_is_refused(path):
    with pytest.raises(XdscaleError, match=r"best\.th: holds no fitting weights for projection\.weight, projection\.b"):
        load_detector(path, size=512, dropout=0.1)


def test_without_a_file_the_branch_is_a_random_resnet_50():
    with torch.device("meta"):
        found = load_detector(None, size=SIZE, dropout=0.3)
        stock = resnet50()
    assert (found.projection.out_features, found.dropout.p) == (SIZE, 0.3)
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        shapes = [{name: tuple(value.shape) for name, value in getattr(net, stage).state_dict().items()
                   if "num_batches" not in name} for net in (found, stock)]  # fmt: skip
        assert shapes[0] == shapes[1]
