"""VisualBERT on tasks: what it reads of their examples; its heads against transformers' (spec VisualBERT §5)."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    VisualBertConfig,
    VisualBertForMultipleChoice,
    VisualBertForQuestionAnswering,
    VisualBertForRegionToPhraseAlignment,
    VisualBertForVisualReasoning,
    VisualBertModel,
)

from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import load_settings
from xdscale.models.visualbert import VisualBERT
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.visualbert import from_bert, load_visualbert, save_visualbert
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.visualbert.schema import VisualBERTSettings
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Slots
from xdscale.tasks.visualbert import VisualBERTClassifier, VisualBERTSubject
from xdscale.training.engine import to_device

WIDTH = 12


def task_of(reads, **of):
    """A task of which only what an encoder is given matters."""
    values = {"name": "toy", "sentences": 1, "images": 1, "reads": reads, "choices": 0, "outputs": 3} | of
    return SimpleNamespace(targets=lambda examples, regions=None: np.zeros(len(examples), np.int64), **values)


def example(texts, images=(), spans=(), name="1"):
    return Example(name, texts, 0, 1, images, spans)


@pytest.fixture(scope="module")
def folder(cassette_model, tmp_path_factory):
    """A VisualBERT made of the 2-layer BERT."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("visualbert")
    model = from_bert(load_language_encoder(Language(name=str(cassette_model)), dropout=0.1), region_size=WIDTH)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_visualbert(model.config, state, out, alignment="mean")
    shutil.copy(cassette_model / "tokenizer.json", out)
    shutil.copy(cassette_model / "tokenizer_config.json", out)
    return out


@pytest.fixture(scope="module")
def read(folder, region_table):
    """Returns a task's first micro-batch as arrays, and the module of VisualBERT with its head."""

    def of(task, examples, real=None, **settings):
        subject = VisualBERTSubject(str(folder), VisualBERTSettings(dropout=0.0, **settings), region_table)
        collate = subject.collator(task, examples)
        ids = np.arange(len(examples))
        batch = collate(Slots(np.zeros_like(ids), ids, np.ones(len(ids), bool) if real is None else np.array(real)))
        torch.manual_seed(1)
        return batch, subject.build(task).eval(), collate

    return of


def padded(batch, segments=True):
    """Takes a packed row apart into what transformers reads."""
    arrays = batch.arrays
    texts, starts = arrays["text_lengths"], np.concatenate([[0], np.cumsum(arrays["text_lengths"])])
    counts = np.diff(arrays["cu_seqlens"]) - texts
    bounds = np.concatenate([[0], np.cumsum(counts)])
    ids, kinds, mask = (torch.zeros(len(texts), max(texts), dtype=torch.long) for _ in range(3))
    visual = torch.zeros(len(texts), max(counts), WIDTH)
    visual_kinds, visual_mask = (torch.zeros(len(texts), max(counts), dtype=torch.long) for _ in range(2))
    for row, (text, count) in enumerate(zip(texts, counts)):
        ids[row, :text] = torch.from_numpy(arrays["text_ids"][starts[row] : starts[row + 1]])
        kinds[row, :text] = torch.from_numpy(arrays["text_segments"][starts[row] : starts[row + 1]])
        mask[row, :text] = 1
        visual[row, :count] = torch.from_numpy(arrays["features"][bounds[row] : bounds[row + 1]].astype(np.float32))
        visual_kinds[row, :count] = torch.from_numpy(arrays["region_segments"][bounds[row] : bounds[row + 1]])
        visual_mask[row, :count] = 1
    return {
        "input_ids": ids, "token_type_ids": kinds, "attention_mask": mask, "visual_embeds": visual,
        "visual_token_type_ids": visual_kinds, "visual_attention_mask": visual_mask,
    }  # fmt: skip


def ours(module, batch):
    with torch.no_grad():
        return module(to_device(batch.arrays, torch.device("cpu")))


def theirs(kind, folder, module, renamed, **sizes):
    """transformers' own model with the same weights."""
    model = kind.from_pretrained(folder, **sizes).eval()
    state = module.state_dict()
    missing = model.load_state_dict({theirs: state[ours] for ours, theirs in renamed.items()}, strict=False)
    assert not missing.unexpected_keys
    return model


def linear(ours, theirs):
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


def test_an_open_question_is_answered_at_the_mask_behind_it(read, folder):
    """VQA: the state at text length − 2, as in transformers, where the index comes from the text's mask alone."""
    questions = [("what colour is the dog ?",), ("where ?",), ("is it a very large red bird that sits there ?",)]
    examples = [example((text,), (f"picture-{place}",)) for place, text in enumerate(questions)]
    batch, module, _ = read(task_of("answer", outputs=7), examples)
    model = theirs(VisualBertForQuestionAnswering, folder, module, linear("classifier", "cls"), num_labels=7)
    with torch.no_grad():
        wanted = model(**padded(batch)).logits
    torch.testing.assert_close(ours(module, batch), wanted, atol=1e-5, rtol=1e-5)
    mask = load_language_tokenizer(str(folder))[1].mask_id
    ids, first = batch.arrays["text_ids"], batch.arrays["cu_seqlens"]
    assert [(ids == mask).sum(), len(first) - 1] == [3, 3]
    assert not any(parameter.requires_grad for parameter in module.encoder.pooler.parameters())  # no loss reaches it


def test_two_images_are_told_apart_by_their_segments(read, folder):
    """Spec VisualBERT fact 8: swapped with their segments nothing changes; without them the logits do."""
    pair = task_of("input", images=2, outputs=2)
    examples = [
        example((("one is red",),), ("picture-0", "picture-1")),
        example((("no",),), ("picture-2", "picture-3")),
    ]
    batch, module, _ = read(pair, examples)
    model = theirs(VisualBertForVisualReasoning, folder, module, linear("classifier", "cls"), num_labels=2)
    with torch.no_grad():
        wanted = model(**padded(batch)).logits
    logits = ours(module, batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert batch.arrays["region_segments"].tolist() == [0] * 3 + [1] * 5 + [0] * 2 + [1] * 4
    other, _, _ = read(pair, [example(one.texts, one.images[::-1]) for one in examples])
    assert not torch.allclose(ours(module, other), logits, atol=1e-4)
    other.arrays["region_segments"] = 1 - other.arrays["region_segments"]
    torch.testing.assert_close(ours(module, other), logits, atol=1e-5, rtol=1e-5)


def test_each_choice_is_read_with_the_image(read, folder):
    """VCR: pooled state, Linear to 1, choices side by side."""
    choices = task_of("input", sentences=2, choices=4, outputs=1)
    answers = ("yes", "no , he is not", "it is a dog", "on the table")
    examples = [
        example(tuple(("who is it ?", answer) for answer in answers), (f"picture-{place}",)) for place in (1, 2)
    ]
    batch, module, _ = read(choices, examples)
    model = theirs(VisualBertForMultipleChoice, folder, module, linear("classifier", "cls"))
    shaped = {name: value.view(2, 4, *value.shape[1:]) for name, value in padded(batch).items()}
    with torch.no_grad():
        wanted = model(**shaped).logits
    torch.testing.assert_close(ours(module, batch).view(2, 4), wanted, atol=1e-5, rtol=1e-5)
    assert batch.targets == {"task": 2}
    assert batch.tokens == batch.arrays["cu_seqlens"][-1]
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_phrase_points_at_a_region(read, folder):
    """Flickr30K: the last word piece of the phrase attends to the regions; transformers' attention has one head."""
    caption = "a small dog and a red tablecloth"
    phrases = [Span(0, 11, -1), Span(16, len(caption), -1)]
    examples = [
        example(((caption,),), (f"picture-{place}",), (((phrase,),),)) for place, phrase in zip((1, 2), phrases)
    ]
    batch, module, _ = read(task_of("region", outputs=0), examples)
    renamed = linear("query", "attention.query") | linear("key", "attention.key")
    model = theirs(VisualBertForRegionToPhraseAlignment, folder, module, renamed)
    tokenizer, _ = load_language_tokenizer(str(folder))
    pieces = tokenizer.encode(caption, add_special_tokens=False).tokens
    last = [pieces.index("dog") + 1, len(pieces)]
    assert model.attention.attention_head_size == 64
    with torch.no_grad():
        wanted = model(**padded(batch), region_to_phrase_position=torch.tensor(last)[:, None]).logits[:, 0]
    logits = ours(module, batch)
    assert logits.shape == (2, 5)
    assert torch.isinf(logits[1, 2:]).all()
    torch.testing.assert_close(logits[0], wanted[0, -5:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, :2], wanted[1, -5:-3], atol=1e-5, rtol=1e-5)


def test_marked_words_are_aligned_with_their_regions(read, folder):
    """VCR's tags, after the cut too: pairs of a region and the place of the word's first piece."""
    choice = ("is jessie near the dog ?", "casey is")
    spans = ((Span(3, 9, 1), Span(19, 22, 2)), (Span(0, 5, 0),))
    task = task_of("input", sentences=2, choices=2, outputs=1)
    examples = [example((choice, choice), ("picture-1",), (spans, spans))]
    batch, _, _ = read(task, examples)
    tokenizer, length = load_language_tokenizer(str(folder))[0], batch.arrays["text_lengths"][0]
    tokens = [tokenizer.id_to_token(token) for token in batch.arrays["text_ids"][:length].tolist()]
    places = dict(zip(batch.arrays["aligned_regions"].tolist(), batch.arrays["aligned_positions"].tolist()))
    first = {region: tokens.index(word) for region, word in ((1, "jessie"), (2, "dog"), (0, "casey"))}
    assert {region: place for region, place in places.items() if region < 5} == first
    cut, _, collate = read(task, examples, max_length=8)
    assert collate.first_cut() == (1, 0)
    assert set(cut.arrays["aligned_regions"][cut.arrays["aligned_regions"] < 5].tolist()) == {1, 0}


CHOICES = ("is jessie near the dog ?", "casey is on the table with riley")
SPANS = ((Span(3, 9, 1), Span(19, 22, 3)), (Span(0, 5, 0), Span(27, 32, 4)))


def tagged(named=None):
    """One question with two choices on the picture of five regions; words name regions 0, 1, 3 and 4."""
    task = task_of("input", sentences=2, choices=2, outputs=1)
    return task, [Example("1", (CHOICES, CHOICES), 0, 1, ("picture-1",), (SPANS, SPANS), named=named)]


def pieces(folder, text):
    return load_language_tokenizer(str(folder))[0].encode(text, add_special_tokens=False)


@pytest.mark.parametrize("max_length", [24, 14, 13, 12, 11, 10, 9, 8])
def test_what_is_too_long_loses_the_second_texts_beginning(read, folder, max_length):
    """Spec VisualBERT §3: one piece after the other, down to the last one; alignments go with their words."""
    task, examples = tagged()
    batch, _, _ = read(task, examples, max_length=max_length, truncation="second_from_front")
    parts, tags = [], []
    for text, spans in zip(CHOICES, SPANS):
        found = pieces(folder, text)
        named = [next((span.region for span in spans if span.start <= start < span.end), None)
                 for start, _ in found.offsets]  # fmt: skip
        parts.append(list(found.ids)), tags.append(named)
    while sum(map(len, parts)) + 3 > max_length:
        shorter = 1 if len(parts[1]) > 1 else 0
        parts[shorter].pop(0), tags[shorter].pop(0)
    ids, length = load_language_tokenizer(str(folder))[1], batch.arrays["text_lengths"][0]
    wanted = [ids.cls_id, *parts[0], ids.sep_id, *parts[1], ids.sep_id]
    assert batch.arrays["text_ids"][:length].tolist() == wanted
    flat = [None, *tags[0], None, *tags[1], None]
    places = dict(zip(batch.arrays["aligned_regions"].tolist(), batch.arrays["aligned_positions"].tolist()))
    assert {region: place for region, place in places.items() if region < 5} == {
        region: flat.index(region) for region in (0, 1, 3, 4) if region in flat
    }


def test_objects_that_nobody_names_are_left_out(read, folder, region_table):
    """Spec VisualBERT §5: their features are not there, and words stay with the regions that they name."""
    task, examples = tagged(named=(0, 1, 3, 4))
    every, _, _ = read(task, examples)
    few, _, _ = read(task, examples, objects="named")
    kept = [0, 1, 3, 4, 5, 6, 8, 9]
    np.testing.assert_array_equal(few.arrays["features"], every.arrays["features"][kept])
    assert [len(few.regions.boxes), few.arrays["cu_seqlens"][-1]] == [5, every.arrays["cu_seqlens"][-1] - 2]
    before, now = (
        list(zip(batch.arrays["aligned_regions"].tolist(), batch.arrays["aligned_positions"].tolist()))
        for batch in (every, few)
    )
    assert [(kept[region], place) for region, place in now] == before
    with pytest.raises(XdscaleError, match=r"model\.objects = named: toy does not say which regions are named"):
        read(task, tagged()[1], objects="named")
    for key, value in (("objects", "named"), ("truncation", "second_from_front")):
        for subject in ("language", "vlbert"):
            refused = (
                f"model.{key} = '{value}': what is finetuned as {subject} has no such choice, it is one of visualbert"
            )
            with pytest.raises(XdscaleError, match=rf"^the command line: {re.escape(refused)}; leave it out$"):
                load_settings("paper", [f"model.{key}={value}"], subject)


def test_text_alone_needs_no_image(read):
    batch, module, _ = read(task_of("input", images=0), [example((("good",),)), example((("not so bad",),))])
    assert ours(module, batch).shape == (2, 3)
    assert batch.regions is None
    assert len(batch.arrays["features"]) == 0


def test_padding_examples_count_for_nothing(read):
    examples = [example((("good",),), ("picture-0",)), example((("bad",),), ("picture-0",))]
    batch, _, _ = read(task_of("input"), examples, real=[True, False])
    assert batch.arrays["labels"].tolist() == [0, -1]
    assert batch.targets == {"task": 1}
    assert batch.tokens == batch.arrays["cu_seqlens"][1]


def test_images_and_features_that_do_not_fit_are_refused(read, folder, tmp_path):
    with pytest.raises(XdscaleError, match="the table of regions has no image 'picture-9'"):
        read(task_of("input"), [example((("good",),), ("picture-9",))])
    narrow = np.zeros((1, 5), np.float32)
    image = RegionImage("a", size=(9, 9), boxes=np.array([[0, 0, 5, 5]], np.float32), features=narrow)
    build_regions([image], tmp_path / "narrow", Detector(model="drawn", class_count=0))
    subject = VisualBERTSubject(str(folder), VisualBERTSettings(), RegionTable.open(tmp_path / "narrow"))
    with pytest.raises(XdscaleError, match=r"features of 5 numbers; .* reads 12 of each region: take a table of"):
        subject.collator(task_of("input"), [example((("good",),), ("a",))])
    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"features_of": {"model": "another", "sha256": None}}))
    subject = VisualBERTSubject(str(copied), VisualBERTSettings(), RegionTable.open(tmp_path / "narrow"))
    with pytest.raises(XdscaleError, match="take a table of the network that it was trained on, another$"):
        subject.require_readable(task_of("input"))
    subject.require_readable(task_of("input", images=0))


def test_random_weights_take_their_sizes_and_the_dropout_alone(folder, region_table):
    task = task_of("input", labels=("no", "yes"))
    for weights in ("random", "pretrained"):
        subject = VisualBERTSubject(str(folder), VisualBERTSettings(weights=weights, dropout=0.25), region_table)
        torch.manual_seed(0)
        encoder = subject.build(task).encoder
        published, _ = load_visualbert(folder)
        names = "embeddings.word_embeddings.weight", "layers.0.attention.query.weight"
        theirs, ours = published.state_dict(), encoder.state_dict()
        assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
        assert [torch.equal(ours[name], theirs[name]) for name in names] == [weights == "pretrained"] * 2
        config = encoder.config
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.25)
        assert encoder.training


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (task_of("input", labels=("no", "yes", "who knows")), ["no", "yes", "who knows"]),
        (task_of("answer", labels=("2", "a dog", "red")), ["2", "a dog", "red"]),
        (task_of("input", outputs=1, choices=2, labels=("a", "b")), ["LABEL_0"]),
        (task_of("region", outputs=0), []),
    ],
)
def test_a_kept_model_says_what_its_outputs_stand_for(folder, region_table, tmp_path, task, names):
    """Also one that goes on from another: the labels are those of the last task."""
    source = folder
    for number, one in enumerate((task_of("input", labels=("x", "y", "z")), task)):
        subject, out = VisualBERTSubject(str(source), VisualBERTSettings(), region_table), tmp_path / str(number)
        out.mkdir()
        subject.export(one, subject.build(one).state_dict(), out)
        source = out
    config = VisualBertModel.from_pretrained(out).config
    assert (config.id2label, config.label2id) == (dict(enumerate(names)), {name: n for n, name in enumerate(names)})


@pytest.mark.parametrize(
    ("width", "task", "parameters"),
    [
        (2048, task_of("answer", outputs=3129), 113_856_825),
        (1024, task_of("input", images=2, outputs=2), 110_665_730),
        (512, task_of("input", sentences=2, choices=4, outputs=1), 110_271_745),
    ],
)
def test_parameters_are_the_published_ones(width, task, parameters):
    """Spec VisualBERT fact 1: VQA, NLVR2 and VCR without its detector."""
    with torch.device("meta"):
        module = VisualBERTClassifier(VisualBERT(VisualBertConfig(visual_embedding_dim=width)), task, dropout=0.1)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        (None, None),
        ({"model": "drawn", "sha256": None}, None),
        ({"model": "drawn", "sha256": "ab" * 32}, None),  # weights that nobody states may be the same
        ({"model": "another", "sha256": "ab" * 32}, "of drawn, but .* on those of another (weights abababababab),"),
        ("drawn", None),
    ],
)
def test_features_of_another_network_than_the_models_are_told(folder, region_table, tmp_path, trained, told):
    """Widths are alike: 2,048 numbers are the features of a dozen detectors."""
    copied = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"features_of": trained}))
    notes = VisualBERTSubject(str(copied), VisualBERTSettings(), region_table).notes()
    assert len(notes) == (told is not None)
    if told is not None:
        assert re.search(told.replace("(", r"\(").replace(")", r"\)"), notes[0])
    assert VisualBERTSubject(str(copied), VisualBERTSettings()).notes() == []
