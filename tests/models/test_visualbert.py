"""VisualBERT on packed tokens against transformers' own model on padded ones (spec VisualBERT §1, §10)."""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, ElectraConfig, ElectraModel, VisualBertConfig, VisualBertModel

from xdscale.data.visual_text import pack
from xdscale.errors import XdscaleError
from xdscale.models.operations import use_definitions
from xdscale.models.visualbert import VisualBERT
from xdscale.pretrained import visualbert as pretrained
from xdscale.pretrained.visualbert import from_bert, load_visualbert, published_name, save_visualbert
from xdscale.shards.regions import Regions
from xdscale.training.engine import to_device

SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
SIZES |= {"vocab_size": 99, "max_position_embeddings": 40, "hidden_dropout_prob": 0.1, "pad_token_id": 0}
WIDTH = 10
TEXTS, REGIONS = (7, 12, 3), (5, 0, 9)


def regions_of(features, offsets):
    """Features of samples, where boxes do not matter."""
    nothing = np.zeros((len(features), 4), np.float32)
    return Regions(features, nothing, nothing[:, 0], np.ones((len(offsets) - 1, 2), np.uint16), offsets)


class Inputs(NamedTuple):
    """Samples of any lengths."""

    texts: list
    segments: list
    regions: Regions
    visual_segments: np.ndarray
    alignments: list

    def packed(self, dtype=torch.float32):
        arrays = to_device(pack(*self), torch.device("cpu"))
        return arrays | {"features": arrays["features"].to(dtype)}

    def padded(self, dtype=torch.float32, more=0):
        """What transformers takes; `more` places of padding than the longest sample needs."""
        text, count = (max(lengths) + more for lengths in (map(len, self.texts), np.diff(self.regions.offsets)))
        samples = len(self.texts)
        ids, segments, mask = (torch.zeros(samples, text, dtype=torch.long) for _ in range(3))
        visual = torch.full((samples, count, WIDTH), 7.0, dtype=dtype)
        visual_segments, visual_mask = (torch.zeros(samples, count, dtype=torch.long) for _ in range(2))
        alignment = torch.full((samples, count, 3), -1)
        for row, (start, end) in enumerate(zip(self.regions.offsets, self.regions.offsets[1:])):
            length = len(self.texts[row])
            ids[row, :length] = torch.from_numpy(self.texts[row])
            segments[row, :length] = torch.from_numpy(self.segments[row])
            mask[row, :length] = 1
            visual[row, : end - start] = torch.from_numpy(self.regions.features[start:end]).to(dtype)
            visual_segments[row, : end - start] = torch.from_numpy(self.visual_segments[start:end])
            visual_mask[row, : end - start] = 1
            for region, position in self.alignments[row]:
                free = int((alignment[row, region] == -1).nonzero()[0])
                alignment[row, region, free] = int(position)
        return {
            "input_ids": ids, "token_type_ids": segments, "attention_mask": mask, "visual_embeds": visual,
            "visual_token_type_ids": visual_segments, "visual_attention_mask": visual_mask,
            "image_text_alignment": alignment,
        }  # fmt: skip

    def valid(self, states):
        """Padded states as packed ones."""
        text = states.shape[1] - self.padded()["visual_embeds"].shape[1]
        rows = []
        for row, count in enumerate(np.diff(self.regions.offsets)):
            rows += [states[row, : len(self.texts[row])], states[row, text : text + count]]
        return torch.cat(rows)


@pytest.fixture
def inputs():
    chance = np.random.default_rng(3)
    offsets = np.cumsum([0, *REGIONS])
    return Inputs(
        [chance.integers(1, 99, length) for length in TEXTS],
        [np.sort(chance.integers(0, 2, length)) for length in TEXTS],
        regions_of(chance.standard_normal((offsets[-1], WIDTH)).astype(np.float32), offsets),
        chance.integers(0, 2, offsets[-1]),
        [np.array([[0, 3], [2, 1], [0, 5]]), np.empty((0, 2), int), np.array([[8, 2], [8, 1], [8, 0], [1, 2]])],
    )


def reference(**options):
    """transformers' model, whose LayerNorms are not those of the start."""
    torch.manual_seed(1)
    model = VisualBertModel(VisualBertConfig(**SIZES, visual_embedding_dim=WIDTH, **options))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name or "visual_" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def weighted(states):
    return (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum()


@pytest.mark.parametrize("plain", [False, True])
def test_outputs_and_gradients_are_those_of_transformers(folder, inputs, plain):
    theirs, (ours, _) = VisualBertModel.from_pretrained(folder).eval(), load_visualbert(folder)
    if plain:
        use_definitions(ours)
    wanted, found = theirs(**inputs.padded()), ours(inputs.packed())
    states = inputs.valid(wanted.last_hidden_state)
    torch.testing.assert_close(found.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, wanted.pooler_output, atol=1e-5, rtol=0)
    (weighted(states) + weighted(wanted.pooler_output)).backward()
    (weighted(found.states) + weighted(found.pooled)).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(published_name(name)), atol=1e-5, rtol=1e-5, msg=name)
    assert not gradients


def test_an_export_loads_with_transformers(folder, inputs, tmp_path):
    ours, _ = load_visualbert(folder)
    state = {f"model.{name}": value for name, value in ours.state_dict().items()}
    (tmp_path / "out").mkdir()
    save_visualbert(ours.config, state, tmp_path / "out", alignment="sum")
    theirs, report = VisualBertModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in VisualBertModel.from_pretrained(folder).state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    again, _ = load_visualbert(tmp_path / "out", dropout=0.3)
    assert again.embeddings.alignment == "sum"
    assert again.layers[0].attention.attention.dropout == 0.3
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


RELEASE = {
    "visual_token_type_embeddings": "token_type_embeddings_visual",
    "visual_position_embeddings": "position_embeddings_visual",
    "visual_projection": "projection",
}


def test_a_checkpoint_of_the_release_is_the_same_model(folder, inputs, tmp_path):
    """Its names, as the script of transformers that converted it has them, its LayerNorms' oldest ones among them."""
    state = {f"bert.bert.{name}": value for name, value in VisualBertModel.from_pretrained(folder).state_dict().items()}
    for theirs, original in RELEASE.items():
        state = {name.replace(f".{theirs}.", f".{original}."): value for name, value in state.items()}
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in state.items()
    }
    state["bert.cls.seq_relationship.weight"] = torch.full((2, 48), 0.25)
    state["bert.cls.seq_relationship.bias"] = torch.zeros(2)
    torch.save(state, tmp_path / "vqa_pre_trained.th")
    (released, heads), (wanted, none) = load_visualbert(tmp_path / "vqa_pre_trained.th"), load_visualbert(folder)
    assert {name: tuple(value.shape) for name, value in heads.items()} == {"match.weight": (2, 48), "match.bias": (2,)}
    assert not none
    assert released.config.num_hidden_layers == 3
    assert (released.config.type_vocab_size, released.config.pad_token_id) == (2, 0)
    assert released.config.visual_embedding_dim == WIDTH
    for name, value in wanted.state_dict().items():
        assert torch.equal(released.state_dict()[name], value), name
    segments = next(name for name in state if name.endswith("token_type_embeddings.weight") and "visual" not in name)
    torch.save(state | {segments: torch.zeros(3, 48)}, tmp_path / "three.th")
    assert pretrained._read(tmp_path / "three.th")[0].type_vocab_size == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, state: values.update(model_type="bert"), "model_type is 'bert'; expected 'visual_bert'"),
        (lambda values, state: state.pop("pooler.dense.bias"), r"no fitting weights for pooler\.dense\.bias of its"),
        (lambda values, state: values.update(num_attention_heads=5), "hidden_size = 48 is not a multiple of num_att"),
        (lambda values, state: values.update(hidden_act="gelo"), "hidden_act is 'gelo', which transformers does not"),
        (lambda values, state: values.update(num_hidden_layers="three"), "not a visual_bert configuration: "),
        (lambda values, state: values.update(alignment="max"), "alignment is 'max'; expected 'sum' or 'mean'"),
        (lambda values, state: values.update(visual_embedding_dim=9), r"for embeddings\.visual_projection\.weight"),
    ],
)
def test_what_is_no_visualbert_is_refused(folder, change, message):
    values, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(values, state)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(state, folder / "model.safetensors")
    with pytest.raises(XdscaleError, match=message):
        load_visualbert(folder)


def without_regions(inputs):
    none = regions_of(np.empty((0, WIDTH), np.float32), np.zeros(len(inputs.texts) + 1, int))
    return Inputs(inputs.texts, inputs.segments, none, np.empty(0, int), None)


def test_without_regions_it_is_bert(inputs, varied_bert):
    """Spec VisualBERT fact 13."""
    bert = varied_bert(SIZES)
    model = from_bert(bert, region_size=WIDTH)
    padded = inputs.padded()
    with torch.no_grad():
        found = model(without_regions(inputs).packed())
        wanted = bert(**{name: padded[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    states = wanted.last_hidden_state[padded["attention_mask"].bool()]
    torch.testing.assert_close(found.states, states, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, wanted.pooler_output, atol=1e-5, rtol=0)


def test_tables_of_regions_start_as_copies(varied_bert):
    bert = varied_bert(SIZES)
    model = from_bert(bert, region_size=WIDTH)
    for table in ("token_type_embeddings", "position_embeddings"):
        copied, own = getattr(model.embeddings, f"visual_{table}").weight, getattr(model.embeddings, table).weight
        assert torch.equal(copied, own)
        assert torch.equal(copied, getattr(bert.embeddings, table).weight)
        assert copied.data_ptr() != own.data_ptr()
    assert not model.embeddings.visual_projection.bias.any()
    assert model.embeddings.visual_projection.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_an_electra_is_refused():
    electra = ElectraModel(ElectraConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    with pytest.raises(XdscaleError, match=r"VisualBERT is made of a BERT, not of 'electra'"):
        from_bert(electra, region_size=WIDTH)


def random_model(**options):
    torch.manual_seed(4)
    late = {"bypass_transformer": not options.pop("early", True)}
    config = VisualBertConfig(**SIZES, visual_embedding_dim=WIDTH, initializer_range=0.2, **late)
    model = VisualBERT(config, **options).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name.lower():
            torch.nn.init.normal_(parameter)
    return model


def region_rows(batch):
    return batch["rows"] >= len(batch["text_ids"])


def test_regions_without_features_are_all_alike(inputs):
    """Spec VisualBERT fact 2: with zero features and zero bias, but for what is aligned and the other segment."""
    blank = inputs.regions._replace(features=np.zeros_like(inputs.regions.features))
    same = inputs._replace(regions=blank, visual_segments=np.zeros_like(inputs.visual_segments), alignments=None)
    embedded = random_model().embeddings(same.packed(torch.float64))[sum(TEXTS) :]
    assert torch.equal(embedded, embedded[:1].expand_as(embedded))
    apart = random_model().embeddings(same._replace(visual_segments=inputs.visual_segments).packed(torch.float64))
    assert len(apart[sum(TEXTS) :].unique(dim=0)) == 2


@pytest.mark.parametrize("early", [True, False])
def test_regions_have_no_order(inputs, early):
    """Spec VisualBERT fact 3."""
    model, offsets = random_model(early=early), inputs.regions.offsets
    order = np.concatenate([start + np.random.default_rng(1).permutation(end - start) for start, end in
                            zip(offsets, offsets[1:])])  # fmt: skip
    place = np.argsort(order)
    turned = inputs._replace(
        regions=inputs.regions._replace(features=inputs.regions.features[order]),
        visual_segments=inputs.visual_segments[order],
        alignments=[
            np.array([[place[start + region] - start, position] for region, position in pairs]).reshape(-1, 2)
            for start, pairs in zip(offsets, inputs.alignments)
        ],
    )
    batches = inputs.packed(torch.float64), turned.packed(torch.float64)
    with torch.no_grad():
        before, after = (model(batch).states for batch in batches)
    regions = region_rows(batches[0])
    torch.testing.assert_close(after[~regions], before[~regions], atol=1e-5, rtol=0)
    torch.testing.assert_close(after[regions], before[regions][order], atol=1e-5, rtol=0)
    assert not np.array_equal(order, np.arange(len(order)))


def test_padding_that_others_compute_changes_nothing(folder, inputs):
    """Spec VisualBERT fact 4: there is none here, and transformers' padded model agrees, however much it pads."""
    ours, theirs = load_visualbert(folder)[0], VisualBertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found, wanted = ours(inputs.packed()).states, theirs(**inputs.padded(more=4)).last_hidden_state
        alone = [ours(one.packed()).states for one in map(inputs_of(inputs), range(3))]
    rows, count = [], max(REGIONS) + 4
    for row, regions in enumerate(REGIONS):
        rows += [wanted[row, : TEXTS[row]], wanted[row, -count:][:regions]]
    torch.testing.assert_close(found, torch.cat(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=0)


def inputs_of(inputs):
    """Returns a function from a sample's number to the sample alone."""

    def one(number):
        part = slice(*inputs.regions.offsets[number : number + 2])
        regions = regions_of(inputs.regions.features[part], np.array([0, part.stop - part.start]))
        return Inputs(
            [inputs.texts[number]], [inputs.segments[number]], regions, inputs.visual_segments[part],
            [inputs.alignments[number]],
        )  # fmt: skip

    return one


def test_images_change_places_with_their_segments(inputs):
    """Spec VisualBERT fact 8: two images are two groups of regions; which is which is in the segments alone."""
    model = random_model()
    two = inputs._replace(visual_segments=np.array([0, 0, 1, 1, 1, *[0] * 4, *[1] * 5]), alignments=None)
    swap = np.array([2, 3, 4, 0, 1, *range(9, 14), *range(5, 9)])
    features = two.regions._replace(features=two.regions.features[swap])
    both = two._replace(regions=features, visual_segments=two.visual_segments[swap])
    with torch.no_grad():
        pooled, together, features_alone = (
            model(batch.packed(torch.float64)).pooled for batch in (two, both, two._replace(regions=features))
        )
    torch.testing.assert_close(together, pooled, atol=1e-12, rtol=0)
    assert (features_alone - pooled)[[0, 2]].abs().amax(1).min() > 1e-3


def test_without_early_fusion_the_text_sees_no_image(inputs):
    """Spec VisualBERT fact 12: bit for bit."""
    model, seen = random_model(early=False), []
    model.layers[-1].register_forward_hook(lambda _, __, states: seen.append(states))
    other = inputs.regions._replace(features=inputs.regions.features[::-1].copy())
    with torch.no_grad():
        first, second = (model(batch.packed(torch.float64)) for batch in (inputs, inputs._replace(regions=other)))
    assert torch.equal(*seen)
    assert len(seen[0]) == sum(TEXTS)
    assert (first.pooled - second.pooled)[[0, 2]].abs().amax(1).min() > 1e-3


def test_without_early_fusion_the_new_layer_is_that_of_transformers(inputs, tmp_path):
    """Put together of transformers' own parts: its forward pass fails there, on the shape of its mask."""
    theirs = reference(bypass_transformer=True)
    theirs.save_pretrained(tmp_path / "late")
    found = load_visualbert(tmp_path / "late")[0](inputs.packed())
    padded = inputs.padded()
    masks = [padded.pop(name) for name in ("attention_mask", "visual_attention_mask")]
    text = masks[0].shape[1]
    away = [(1.0 - mask[:, None, None]) * -1e4 for mask in (masks[0], torch.cat(masks, 1))]
    embedded = theirs.embeddings(**padded)
    words = theirs.encoder(embedded[:, :text], attention_mask=away[0])[0]
    states = theirs.additional_layer(torch.cat([words, embedded[:, text:]], 1), away[1])
    states = states[0] if isinstance(states, tuple) else states
    torch.testing.assert_close(found.states, inputs.valid(states), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled, theirs.pooler(states), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("alignment", "of_words"), [("sum", torch.sum), ("mean", torch.mean)])
def test_positions_of_aligned_words(inputs, alignment, of_words):
    """Spec VisualBERT fact 14."""
    tables, batch = random_model(alignment=alignment).embeddings, inputs.packed(torch.float64)
    tables.LayerNorm = torch.nn.Identity()
    found = tables(batch)[sum(TEXTS) :] - tables.visual_projection(batch["features"])
    found = found - tables.visual_token_type_embeddings.weight[batch["region_segments"]]
    wanted = tables.visual_position_embeddings.weight[:1].repeat(len(found), 1)
    positions = tables.position_embeddings.weight
    for region, words in ((0, [3, 5]), (2, [1]), (5 + 8, [2, 1, 0]), (5 + 1, [2])):
        wanted[region] += of_words(positions[words], 0)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("recomputed", [True, False])
def test_only_selected_tokens_are_computed_to_the_end(inputs, early, recomputed):
    """The same states and gradients, in the order that was asked for, a first token among them."""
    model, batch = random_model(early=early).train(), inputs.packed(torch.float64)
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.embeddings.dropout.p = 0.0
    if recomputed:
        model.enable_activation_checkpointing()
    selected, results = torch.tensor([30, 2, 12, 11, 20]), []
    for chosen in (None, selected):
        model.zero_grad()
        states, pooled, bounds = model(batch, chosen)
        states = states[selected] if chosen is None else states
        (weighted(states) + weighted(pooled)).backward()
        results.append((states, pooled, bounds, *(parameter.grad.clone() for parameter in model.parameters())))
    for all_of_it, of_selected in zip(*results, strict=True):
        torch.testing.assert_close(of_selected, all_of_it, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("width", "parameters"), [(512, 110_270_976), (1024, 110_664_192), (2048, 111_450_624), (2054, 111_455_232)]
)
def test_parameters_of_the_base_model(width, parameters):
    """Spec VisualBERT fact 1."""
    with torch.device("meta"):
        model = from_bert(BertModel(BertConfig()), region_size=width)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
