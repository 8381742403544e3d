"""VL-BERT's pretraining from pixels, with Fast R-CNN trained along (spec VL-BERT §1.4, §10)."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from xdscale.data.pictures import MEANS, scaled_boxes
from xdscale.data.vlbert_pretraining import VLBERTCollator
from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.models.fast_rcnn import load_fast_rcnn
from xdscale.plan.profile import parameter_table, profile_model
from xdscale.plan.states import count
from xdscale.pretrained.vlbert import load_vlbert, save_release
from xdscale.recipe import load_recipe
from xdscale.shards.manifest import Manifest
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots, open_system
from xdscale.systems.vlbert import check_tables, continuations
from xdscale.training.engine import to_device
from xdscale.training.run_folder import read_log
from xdscale.training.stored import build_module

NAMES = ("mlm", "text_mlm", "masked_region")
PIXELS = "model.pixels={weights: random, short_side: 32, long_side: 48}"
TABLES = ["model.region_size=2048", "model.region_classes=5", "model.max_elements=24", PIXELS, "model.dropout=0"]


def recipe(*overrides):
    return load_recipe("quickstart-vlbert", [*TABLES, *overrides])


@pytest.fixture(scope="module")
def small(small_trunk):
    """The override for a small ResNet: what trains with it hangs on no depth."""
    return PIXELS.replace("random", str(small_trunk))


@pytest.fixture
def module(small):
    """The module, whose images count."""
    torch.manual_seed(0)
    found = build_module(open_system(recipe(small)), continued=False)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "visual_norm" in name:
                parameter.fill_(0.5)
    return found


@pytest.fixture
def collate(photographs):
    tables = [Table(photographs, "train", name) for name in ("captions", "text")]
    found = recipe("objectives.masked_region.select=0.5")
    return VLBERTCollator(*tables, recipe=found, continues=continuations(found.model.language))


def slots_of(collate, captions, texts, real=True):
    ids = [*captions, *(len(collate.captions) + number for number in texts)]
    return Slots(np.zeros(len(ids), int), np.array(ids), np.full(len(ids), real))


def batch_of(micro_batch, dtype=torch.float32):
    batch = to_device(micro_batch.arrays, torch.device("cpu"))
    return {name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in batch.items()}  # fmt: skip


def test_what_is_masked_is_blank_and_the_rest_is_the_scaled_picture(collate):
    """Spec VL-BERT fact 9: pixels of exactly 0 after normalisation, so that no feature depends on what was there."""
    batch = collate(slots_of(collate, range(12), [3]))
    arrays, seen = batch.arrays, collate.regions.read(collate.captions.read("image", np.arange(12)).astype(int))
    files, bounds = collate.regions.table.read_ragged("jpeg", collate.captions.read("image", np.arange(12)).astype(int))
    assert "features" not in arrays
    assert arrays["picture_12"].shape == (3, 32, 32)
    assert len(arrays["boxes_12"]) == 0
    masked_pixels, first = 0, 0
    for sample in range(12):
        picture, boxes = arrays[f"picture_{sample}"], arrays[f"boxes_{sample}"]
        masked = arrays["masked_regions"][first : first + len(boxes)].astype(bool)
        first += len(boxes)
        height, width = picture.shape[1:]
        assert (min(height, width), max(height, width)) in ((32, 48), (32, 32))
        assert boxes[0].tolist() == [0, 0, width - 1, height - 1]
        assert not masked[0]
        size = tuple(seen.sizes[sample].tolist())
        mine = seen.boxes[slice(*seen.offsets[sample : sample + 2])]
        np.testing.assert_allclose(boxes[1:], scaled_boxes(mine, size, (width, height)))
        hidden = np.zeros((height, width), bool)
        for left, top, right, bottom in boxes[masked].astype(int):
            hidden[top : bottom + 1, left : right + 1] = True
        assert not picture[:, hidden].any()
        masked_pixels += hidden.sum()
        image = Image.open(io.BytesIO(files[bounds[sample] : bounds[sample + 1]].tobytes())).convert("RGB")
        wanted = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)[:, :, ::-1] - MEANS
        np.testing.assert_allclose(picture[:, ~hidden], wanted.transpose(2, 0, 1)[:, ~hidden])
    assert masked_pixels > 500


def test_mirrored_pictures_are_those_of_mirrored_files(photographs, collate):
    """The release mirrors scaled pictures and boxes, blanks what is masked then, and leaves words as they are."""
    tables = [Table(photographs, "train", name) for name in ("captions", "text")]
    found = recipe("objectives.masked_region.select=0.5", "model.flip=0.5")
    flipping = VLBERTCollator(*tables, recipe=found, continues=collate.tokens.continues, flips=True)
    slots = slots_of(collate, range(12), [3])
    mirror, usual, other = flipping.draws(slots)[-1], collate(slots).arrays, flipping(slots).arrays
    assert 2 < mirror.sum() < 11
    assert not mirror[12]  # a text
    assert len(flipping.draws(slots)) == len(collate.draws(slots)) + 1
    first, hidden_ones = 0, 0
    for sample in range(12):
        picture, boxes = usual[f"picture_{sample}"], usual[f"boxes_{sample}"]
        places = slice(first, first + len(boxes))
        first += len(boxes)
        masked, where = usual["masked_regions"][places].astype(bool), usual["places"][places].copy()
        if mirror[sample]:
            last = picture.shape[2] - 1
            boxes = np.stack([last - boxes[:, 2], boxes[:, 1], last - boxes[:, 0], boxes[:, 3]], 1)
            where[:, 0] = 100 - where[:, 0]
            picture = picture[:, :, ::-1]
        hidden = np.zeros(picture.shape[1:], bool)
        for left, top, right, bottom in boxes[masked].astype(int):
            hidden[top : bottom + 1, left : right + 1] = True
        np.testing.assert_allclose(other[f"boxes_{sample}"], boxes, atol=1e-4)
        np.testing.assert_allclose(other["places"][places], where, atol=1e-4)
        assert not other[f"picture_{sample}"][:, hidden].any()
        shown = ~hidden & (picture != 0).any(0)  # which was not blank in the usual one, up to the edge of a pixel
        np.testing.assert_array_equal(other[f"picture_{sample}"][:, shown], picture[:, shown])
        hidden_ones += hidden.sum() * mirror[sample]
    assert hidden_ones > 200
    kept = ("text_ids", "mlm_labels", "mlm_rows", "masked_region_rows", "masked_region_labels", "text_visual")
    assert all(np.array_equal(usual[name], other[name]) for name in kept)


def test_every_trained_parameter_gets_a_gradient_and_frozen_ones_do_not(module, collate):
    """Also without captions, without texts and without targets: so that all ranks do the same."""
    module.train()
    assert not any(part.training for part in module.trunk.modules() if isinstance(part, torch.nn.BatchNorm2d))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for slots in (slots_of(collate, (1, 2), (3,)), slots_of(collate, (), (3, 4)), slots_of(collate, (5,), ()),
                  slots_of(collate, (1,), (2,), real=False)):  # fmt: skip
        module.zero_grad()
        terms = module(batch_of(collate(slots)))
        sum(term.loss_sum for term in terms.values()).backward()
        assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert module.trunk.conv1.weight.grad is None
        reached = module.trunk.layer2[0].conv1.weight.grad.any()
        assert reached == bool((slots.sample_ids < len(collate.captions)).any() and slots.real.all())
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_batch_is_the_sum_of_its_samples(module, collate):
    """The gradient of a batch and of its samples one by one, in fp64: no image depends on those beside it."""
    module.double()
    slots, found = slots_of(collate, (3, 8, 13), (5,)), []
    for size in (4, 1):
        module.zero_grad()
        for first in range(0, 4, size):
            part = Slots(*(array[first : first + size] for array in vars(slots).values()))
            terms = module(batch_of(collate(part), torch.float64))
            sum(term.loss_sum for term in terms.values()).backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]))
    assert (found[1] - found[0]).norm() / found[0].norm() < 1e-10


@pytest.mark.parametrize(
    ("name", "without"),
    [("vlbert-base-e2e", 114_489_467), ("vlbert-large-e2e", 342_069_627), ("vlbert-base-e2e-paper", 114_489_467)],
)
def test_parameters_of_published_runs(name, without, monkeypatch):
    """Spec VL-BERT fact 1: §1.7, and ResNet-101."""
    rows = parameter_table(load_recipe(name, ["model.pixels.weights=random"]))
    counted = {row.part: row.parameters for row in rows}
    assert [row.part for row in rows if row.total] == ["model without Fast R-CNN", "model during training"]
    assert counted["model without Fast R-CNN"] == without
    assert counted["Fast R-CNN"] == 42_500_160
    assert counted["model during training"] == without + 42_500_160


def test_the_plan_counts_the_branch(monkeypatch):
    """Images of twice the side take four times as much in C1 to C4, and as much in C5, which is of regions."""
    monkeypatch.setattr("xdscale.plan.profile._SAMPLES", 4)  # each image is traced by itself
    small, large = (
        profile_model(
            recipe(f"model.pixels.short_side={side}", f"model.pixels.long_side={side * 4 // 3}"), precision="bf16"
        )
        for side in (96, 192)
    )
    assert count(small.modules) > 42_500_160
    # C1 to C4 take 7.0 GMAC of 224 × 224 pixels; backward takes once or twice that again; half of the samples are texts
    forward = 0.5 * (4 - 1) * 2 * 7.0e9 * (96 * 128) / 224**2
    assert 2 * forward < large.flops_per_sequence - small.flops_per_sequence < 3 * forward
    assert large.kept.per_sample > small.kept.per_sample


def test_a_table_without_images_is_refused(grounded_pictures, photographs):
    check_tables(recipe(), Manifest.load(photographs))
    with pytest.raises(XdscaleError, match=r"model\.pixels needs the images themselves, which this table of regions"):
        check_tables(recipe("model.region_classes=7"), Manifest.load(grounded_pictures))
    with pytest.raises(XdscaleError, match="region_size = 12: of pixels ResNet-101 makes 2,048 numbers"):
        recipe("model.region_size=12")


@pytest.fixture(scope="module")
def runs(run_by_stage, photographs, small, narrow_bert):
    """Run folders by ZeRO stage, of two steps."""
    fixed = [*narrow_bert, *TABLES, small, f"data.shards={photographs}", "training.steps=2", "training.global_batch=4"]
    fixed += ["run.eval_samples=4", "run.eval_every=2", "run.checkpoint_every=2"]
    micro_batches = {0: 4, 1: 2, 2: 1, 3: 1}  # of 1 a rank has captions alone, the other one texts
    return run_by_stage("quickstart-vlbert", fixed, {0: (1,), 1: (2,), 2: (2,), 3: (2,)}, micro_batches)


@pytest.mark.slow
def test_it_trains_alike_under_every_stage(runs):
    found = {}
    for stage, run in runs.items():
        steps = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "step"]
        # A step may mask no region, and has no figure of it then.
        found[stage] = np.array([[float(entry.get(f"loss/{name}", "nan")) for name in NAMES] for entry in steps])
    assert found[0].shape == (2, 3)
    for stage in (1, 2, 3):
        np.testing.assert_allclose(found[stage], found[0], rtol=1e-4)


@pytest.mark.slow
def test_an_export_has_the_branch_for_extraction_and_for_the_release(runs, small, tmp_path):
    start = build_module(open_system(recipe(small)), continued=False).trunk.state_dict()
    statistics = {name: value for name, value in start.items() if "running_var" in name}
    for stage in (2, 3):
        out = tmp_path / f"export-{stage}"
        export_run(runs[stage], out)
        trunk = load_fast_rcnn(out / "fast_rcnn.safetensors")
        _, heads = load_vlbert(out)
        for name, value in trunk.state_dict().items():
            assert torch.equal(heads[f"trunk.{name}"], value.float()), name
        assert len(statistics) == 26
        assert all(torch.equal(trunk.state_dict()[name], value) for name, value in statistics.items())
    model, heads = load_vlbert(tmp_path / "export-2")
    assert model.config.features_of is None
    state = {f"model.{name}": value for name, value in model.state_dict().items()} | heads
    save_release(state, tmp_path / "e2e.model")
    again, more = load_vlbert(tmp_path / "e2e.model")
    for name, value in (model.state_dict() | heads).items():
        assert torch.equal((again.state_dict() | more)[name], value), name
    stored = torch.load(tmp_path / "e2e.model", weights_only=True)["state_dict"]
    places = ("backbone.layer3.1.conv3.weight", "roi_head_feature_extractor.2.conv1.weight", "head.0.2.conv1.weight")
    assert all(f"module.image_feature_extractor.{place}" in stored for place in places)
