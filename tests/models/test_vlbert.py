"""VL-BERT on packed tokens against the release's computation on padded ones (spec VL-BERT §1, §10)."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from xdscale.data.vlbert import centres, pack
from xdscale.models.heads import RegionClassHead, masked_lm_head
from xdscale.models.operations import use_definitions
from xdscale.models.vlbert import VLBERT, VLBertConfig, geometry_embedding
from xdscale.pretrained.vlbert import from_bert, load_vlbert, published_name
from xdscale.shards.regions import Regions
from xdscale.training.engine import to_device

from . import padded_vlbert

SIZES, release = padded_vlbert.SIZES, padded_vlbert.release
TEXTS, REGIONS, CLASSES = (7, 12, 3, 5), (5, 0, 9, 1), 11


class Inputs(NamedTuple):
    """Samples of any lengths; the second one is text alone."""

    texts: list
    segments: list
    regions: Regions
    looks_at: list
    masked: np.ndarray

    def packed(self, dtype=torch.float32):
        arrays = to_device(pack(*self), torch.device("cpu"))
        return arrays | {"features": arrays["features"].to(dtype), "places": arrays["places"].to(dtype)}

    def padded(self, dtype=torch.float32, more=0):
        samples, offsets = len(self.texts), self.regions.offsets
        longest, most = (max(map(int, found)) + more for found in (map(len, self.texts), np.diff(offsets)))
        words = {name: torch.zeros(samples, longest, dtype=torch.long) for name in ("ids", "types", "looks_at")}
        text_mask, box_mask = torch.zeros(samples, longest, dtype=bool), torch.zeros(samples, most, dtype=bool)
        boxes, features = torch.full((samples, most, 4), 7.0, dtype=dtype), torch.ones(samples, most, 2048, dtype=dtype)
        masked = torch.zeros(samples, most, dtype=bool)
        for row, text in enumerate(self.texts):
            for name, values in (("ids", text), ("types", self.segments[row]), ("looks_at", self.looks_at[row])):
                words[name][row, : len(text)] = torch.from_numpy(np.asarray(values, np.int64))
            text_mask[row, : len(text)] = True
            part = slice(offsets[row], offsets[row + 1])
            count = part.stop - part.start
            box_mask[row, :count] = True
            boxes[row, :count] = torch.from_numpy(self.regions.boxes[part]).to(dtype)
            features[row, :count] = torch.from_numpy(self.regions.features[part]).to(dtype)
            masked[row, :count] = torch.from_numpy(self.masked[part])
        sizes = torch.from_numpy(self.regions.sizes.astype(np.float64)).to(dtype)
        return words | {
            "text_mask": text_mask, "box_mask": box_mask, "boxes": boxes, "features": features, "masked": masked,
            "sizes": sizes,
        }  # fmt: skip

    def one(self, number):
        part = slice(*self.regions.offsets[number : number + 2])
        features, boxes, confidences = (array[part] for array in self.regions[:3])
        regions = Regions(
            features, boxes, confidences, self.regions.sizes[number : number + 1], np.array([0, part.stop - part.start])
        )
        return Inputs(*([each[number]] for each in self[:2]), regions, [self.looks_at[number]], self.masked[part])


@pytest.fixture
def inputs():
    chance = np.random.default_rng(3)
    offsets = np.cumsum([0, *REGIONS])
    corners = chance.uniform(0, 50, (offsets[-1], 2))
    boxes = np.concatenate([corners, corners + chance.uniform(1, 50, (offsets[-1], 2))], 1).astype(np.float32)
    features = chance.standard_normal((offsets[-1], 2048)).astype(np.float32)
    sizes = np.array([[100, 120], [1, 1], [110, 100], [333, 500]], np.uint16)
    return Inputs(
        [chance.integers(1, 99, length) for length in TEXTS],
        [np.sort(chance.integers(0, 2, length)) for length in TEXTS],
        Regions(features, boxes, boxes[:, 0], sizes, offsets),
        [chance.integers(0, max(1, count), length) for length, count in zip(TEXTS, REGIONS)],
        np.isin(np.arange(offsets[-1]), [2, 6, 11]),
    )


def weighted(states):
    return (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum()


def as_packed(inputs, texts, objects, ends):
    rows = []
    for row, (length, count) in enumerate(zip(map(len, inputs.texts), np.diff(inputs.regions.offsets))):
        rows += [texts[row, :length], objects[row, :count], ends[row : row + 1]]
    return torch.cat(rows)


@pytest.mark.parametrize("plain", [False, True])
def test_outputs_and_gradients_are_those_of_the_release(release, inputs, plain):
    theirs, path = release(with_pooler=True)
    ours, heads = load_vlbert(path)
    assert not heads
    if plain:
        use_definitions(ours)
    texts, objects, ends, pooled = theirs(inputs.padded())
    found, wanted = ours(inputs.packed()), as_packed(inputs, texts, objects, ends)
    torch.testing.assert_close(found.states, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, pooled, atol=1e-5, rtol=0)
    (weighted(wanted) + weighted(pooled)).backward()
    (weighted(found.states) + weighted(found.pooled)).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    both = [gradients.pop(f"{name}.weight") for name in ("object_linguistic_embeddings", "object_mask_word_embedding")]
    gradients["region_tokens.weight"] = torch.cat(both)
    for name, parameter in ours.named_parameters():
        wanted = gradients.pop(published_name(name))
        torch.testing.assert_close(
            parameter.grad, wanted, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text
        )
    assert not gradients


def with_targets(inputs, dtype=torch.float32):
    """What is to be predicted, packed and padded: some words of each text, some regions."""
    chance, padded = np.random.default_rng(5), inputs.padded(dtype)
    labels = torch.full_like(padded["ids"], -1)
    probs = torch.zeros(*padded["box_mask"].shape, CLASSES, dtype=dtype)
    bounds, texts = pack(*inputs)["cu_seqlens"], ([], [])
    rows, targets = [], []
    for row, (length, count) in enumerate(zip(TEXTS, REGIONS)):
        for place in chance.permutation(length)[:3]:
            labels[row, place] = int(chance.integers(1, 99))
            texts[count == 0].append((bounds[row] + place, labels[row, place]))
        for region in chance.permutation(count)[:2]:
            probs[row, region] = torch.from_numpy(chance.dirichlet(np.full(CLASSES, 0.3)))
            rows.append(int(bounds[row] + length + region))
            targets.append(probs[row, region])
    return padded | {"mlm_labels": labels, "class_probs": probs}, texts, torch.tensor(rows), torch.stack(targets)


def test_losses_are_those_of_the_release(release, inputs):
    theirs, path = release(classes=CLASSES)
    ours, heads = load_vlbert(path)
    padded, texts, rows, targets = with_targets(inputs)
    mlm, masked_region = masked_lm_head(ours), RegionClassHead(64, CLASSES)
    mlm.load_state_dict({name[4:]: value for name, value in heads.items() if name.startswith("mlm.")}, strict=False)
    masked_region.load_state_dict({n.removeprefix("masked_region."): v for n, v in heads.items() if n[1] == "a"})
    states = ours(
        inputs.packed(), torch.cat([*(torch.tensor([row for row, _ in part]) for part in texts), rows])
    ).states
    of_captions, of_texts, of_regions = states.split([len(texts[0]), len(texts[1]), len(rows)])
    found = [
        mlm(part, torch.tensor([label for _, label in wanted]))[0].mean()
        for part, wanted in ((of_captions, texts[0]), (of_texts, texts[1]))
    ]
    found.append(masked_region(of_regions, targets)[0] / len(rows))
    wanted = theirs.losses(padded)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sum(found).backward()
    sum(wanted).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name in ("embeddings.word_embeddings.weight", "regions.projection.weight", "regions.mask.weight"):
        torch.testing.assert_close(ours.get_parameter(name).grad, gradients[published_name(name)], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        masked_region.transform.weight.grad, gradients["vlbert.mvrc_head.transform.dense.weight"], atol=1e-5, rtol=1e-5
    )


def test_a_finetuned_checkpoint_of_the_release_is_read(release, inputs, tmp_path):
    """VCR's has its encoder under another name, and no vectors that only pretraining needs."""
    theirs, path = release(with_pooler=True)
    state = torch.load(path, weights_only=True)["state_dict"]
    gone = ("aux_text_visual", "object_mask")
    kept = {name.replace("module.vlbert.", "module.vlbert._module."): value for name, value in state.items()}
    kept = {name: value for name, value in kept.items() if not any(word in name for word in gone)}
    torch.save({"state_dict": kept}, tmp_path / "vcr.model")
    ours, _ = load_vlbert(tmp_path / "vcr.model")
    assert not ours.config.masks_features
    seen = inputs.one(0)._replace(masked=np.zeros(5, bool))
    with torch.no_grad():
        found, (texts, objects, ends, _) = ours(seen.packed()), theirs(seen.padded())
    torch.testing.assert_close(found.states, as_packed(seen, texts, objects, ends), atol=1e-5, rtol=0)


def text_alone(inputs):
    none = np.empty((0, 4), np.float32)
    regions = Regions(np.empty((0, 2048), np.float32), none, none[:, 0], np.ones((4, 2), np.uint16), np.zeros(5, int))
    return inputs._replace(regions=regions, masked=np.empty(0, bool))


def without_end(batch):
    """The same samples whose [END] is not there."""
    bounds = batch["cu_seqlens"] - torch.arange(len(batch["cu_seqlens"]), dtype=torch.int32)
    last = torch.isin(torch.arange(len(batch["rows"])), batch["cu_seqlens"][1:].long() - 1)
    return batch | {"cu_seqlens": bounds, "rows": batch["rows"][~last]}


def test_at_the_start_a_text_is_read_as_by_bert(inputs, varied_bert):
    """Spec VL-BERT fact 2."""
    bert = varied_bert(SIZES)
    model = from_bert(bert, masks_features=True, with_pooler=True)
    padded = inputs.padded()
    with torch.no_grad():
        found = model(without_end(text_alone(inputs).packed()))
        wanted = bert(padded["ids"], attention_mask=padded["text_mask"].long(), token_type_ids=padded["types"])
    states = wanted.last_hidden_state[padded["text_mask"]]
    torch.testing.assert_close(found.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, wanted.pooler_output, atol=1e-5, rtol=0)


def other_image(inputs):
    boxes, features = inputs.regions.boxes + 3, inputs.regions.features[::-1] * 2
    return inputs._replace(regions=inputs.regions._replace(boxes=boxes, features=features))


def test_at_the_start_images_change_nothing_and_after_a_step_they_do(inputs, varied_bert):
    """Spec VL-BERT fact 3; and features have no gradient in the first step (§1.3)."""
    model = from_bert(varied_bert(SIZES), masks_features=True)
    states = model(inputs.packed()).states
    assert torch.equal(states, model(other_image(inputs).packed()).states)
    weighted(states).backward()
    assert not model.regions.projection.weight.grad.any()
    assert model.embeddings.visual_norm_region.weight.grad.any()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert not torch.allclose(model(inputs.packed()).states, model(other_image(inputs).packed()).states, atol=1e-3)


def random_model(**options):
    torch.manual_seed(4)
    model = VLBERT(VLBertConfig(**SIZES, initializer_range=0.2, **options)).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            torch.nn.init.normal_(parameter)
    return model


def region_rows(inputs):
    bounds = pack(*inputs)["cu_seqlens"]
    return [np.arange(bounds[row] + length, bounds[row + 1] - 1) for row, length in enumerate(TEXTS)]


def test_regions_that_are_equal_stay_equal_and_have_no_order(inputs):
    """Spec VL-BERT fact 4."""
    model, found = random_model(), region_rows(inputs)
    everywhere = inputs._replace(looks_at=[np.zeros(length, int) for length in TEXTS], masked=np.zeros(15, bool))
    alike = everywhere.regions._replace(
        features=np.ones_like(inputs.regions.features), boxes=np.full_like(inputs.regions.boxes, 9)
    )
    order = np.array([0, 3, 1, 4, 2, *(5 + np.array([0, 8, 7, 1, 2, 6, 3, 5, 4])), 14])
    turned = everywhere.regions._replace(
        features=inputs.regions.features[order], boxes=inputs.regions.boxes[order]
    )  # the whole image stays the first
    with torch.no_grad():
        states, same, other = (
            model(one.packed(torch.float64)).states
            for one in (everywhere, everywhere._replace(regions=alike), everywhere._replace(regions=turned))
        )
    torch.testing.assert_close(same[found[2]], same[found[2][:1]].expand(9, -1), atol=1e-12, rtol=0)
    regions = np.concatenate(found)
    words = np.setdiff1d(np.arange(len(states)), regions)
    torch.testing.assert_close(other[words], states[words], atol=1e-10, rtol=0)
    torch.testing.assert_close(other[regions], states[regions][order], atol=1e-10, rtol=0)


def test_geometry_in_fp64():
    """Spec VL-BERT fact 5 and §1.3, one number at a time."""
    boxes = np.array([[12, 30, 80, 90], [0, 0, 640, 480]], np.float32)
    sizes = np.array([[640, 480], [640, 480]], np.uint16)

    def embedded(scale):
        regions = Regions(np.empty((2, 0)), boxes * scale, boxes[:, 0], sizes * scale, np.array([0, 1, 2]))
        return geometry_embedding(torch.from_numpy(centres(regions)))

    found = embedded(1)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(embedded(3), found, atol=2e-5, rtol=0)
    torch.testing.assert_close(found.square().sum(1), torch.full((2,), 1024.0))
    for number, value in enumerate((46 / 640, 60 / 480, 68 / 640, 60 / 480)):
        for wave in (0, 1, 100, 255):
            angle = 100 * value / 1000 ** (wave / 256)
            assert found[0, 512 * number + wave].item() == pytest.approx(math.sin(angle), abs=2e-5)
            assert found[0, 512 * number + 256 + wave].item() == pytest.approx(math.cos(angle), abs=2e-5)
    np.testing.assert_allclose(embedded(1)[1, 0].item(), math.sin(50), atol=2e-5)


def test_what_the_paper_reads_by_hand_in_fp64(inputs):
    """Spec VL-BERT §8, 1, 3 and 12: corners as shares, the whole image at [END], one token for all regions."""
    model = random_model(corners=True, end_sees_image=True, own_masked_token=False)
    found = []
    model.embeddings.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    batch = inputs.packed(torch.float64)
    with torch.no_grad():
        model(batch)
        own, regions = model.embeddings, inputs.regions
        sizes = np.repeat(regions.sizes, np.diff(regions.offsets), axis=0).astype(np.float64)
        waves = [1000 ** (wave / 256) for wave in range(256)]
        rows = []
        for (x1, y1, x2, y2), (width, height) in zip(regions.boxes.astype(np.float64), sizes):
            for share in (x1 / width, y1 / height, x2 / width, y2 / height):
                rows += [math.sin(share / wave) for wave in waves] + [math.cos(share / wave) for wave in waves]
        where = torch.tensor(rows).double().view(-1, 2048)
        features = torch.from_numpy(regions.features).double()
        features[torch.from_numpy(inputs.masked)] = model.regions.mask.weight
        linear = model.regions.projection
        seen = (torch.cat([where, features], 1) @ linear.weight.T + linear.bias).relu()
        position, segment = own.position_embeddings.weight, own.token_type_embeddings.weight[2]
        lengths = np.repeat(TEXTS, REGIONS)
        of_regions = model.region_tokens.weight[0] + own.visual_norm_region(seen) + position[lengths] + segment
        wholes = torch.cat([seen[:1], model.text_only.weight, seen[5:6], seen[14:]])
        ends = own.end_embedding.weight + own.visual_norm_text(wholes) + position[np.array(TEXTS) + 1] + segment
        wanted = own.LayerNorm(torch.cat([of_regions, ends]))
    torch.testing.assert_close(found[0][sum(TEXTS) :], wanted, atol=2e-6, rtol=0)  # places are fp32
    assert not torch.allclose(random_model()(batch).states, model(batch).states, atol=1e-2)


def test_padding_changes_nothing(release, inputs):
    """Spec VL-BERT fact 6: there is none here, and the padded model agrees, however much it pads."""
    theirs, path = release()
    ours, _ = load_vlbert(path)
    with torch.no_grad():
        texts, objects, ends, _ = theirs(inputs.padded(more=4))
        found = ours(inputs.packed()).states
        alone = [ours(inputs.one(number).packed()).states for number in range(4)]
    torch.testing.assert_close(found, as_packed(inputs, texts, objects, ends), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)


def test_what_is_probable_is_learned_as_that():
    """Spec VL-BERT fact 8, in fp64: at the target the loss is its entropy, and there is no gradient."""
    torch.manual_seed(0)
    head, target = RegionClassHead(8, 6).double(), torch.rand(4, 6, dtype=torch.float64)
    target = target / target.sum(1, keepdim=True)
    with torch.no_grad():
        head.classifier.weight.zero_()
    states = torch.randn(4, 8, dtype=torch.float64)
    for row in range(4):
        head.classifier.bias.data = target[row].log() + 3
        loss, correct = head(states[row : row + 1], target[row : row + 1])
        loss.backward()
        assert loss.item() == pytest.approx(-(target[row] * target[row].log()).sum().item(), abs=1e-12)
        assert head.classifier.bias.grad.abs().max() < 1e-12
        assert correct == 1
        head.zero_grad()
    nothing, none = head(states[:0], target[:0])
    nothing.backward()
    assert (nothing, none) == (0, 0)
    assert not head.transform.weight.grad.any()


def test_a_text_alone_sees_no_image(inputs):
    """Spec VL-BERT fact 12: and it does not depend on what stands beside it."""
    model = random_model()
    with torch.no_grad():
        bounds = pack(*inputs)["cu_seqlens"]
        states, other = (model(one.packed(torch.float64)).states for one in (inputs, other_image(inputs)))
    assert torch.equal(states[bounds[1] : bounds[2]], other[bounds[1] : bounds[2]])
    assert not torch.allclose(states[bounds[0] : bounds[1]], other[bounds[0] : bounds[1]])


@pytest.mark.parametrize("with_pooler", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_only_selected_tokens_are_computed_to_the_end(inputs, with_pooler, recomputed):
    model, batch = random_model(with_pooler=with_pooler).train(), inputs.packed(torch.float64)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if recomputed:
        model.enable_activation_checkpointing()
    runs = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda *arguments: runs.append(arguments))
    selected, results = torch.tensor([30, 2, 12, 13, 0]), []
    for chosen in (None, selected):
        model.zero_grad()
        states, pooled, bounds = model(batch, chosen)
        states = states[selected] if chosen is None else states
        (weighted(states) + (weighted(pooled) if with_pooler else 0)).backward()
        results.append((states, bounds, *(parameter.grad.clone() for parameter in model.parameters())))
        assert (pooled is None) != with_pooler
    assert len(runs) == len(results) * len(model.layers) * (2 if recomputed else 1)
    for all_of_it, of_selected in zip(*results, strict=True):
        torch.testing.assert_close(of_selected, all_of_it, atol=1e-11, rtol=0)


def test_a_word_that_looks_at_no_region_of_its_image_is_refused(inputs):
    with pytest.raises(ValueError, match="looks at a region that its sample has not"):
        pack(*inputs._replace(looks_at=[np.full(7, 5), *inputs.looks_at[1:]]))
