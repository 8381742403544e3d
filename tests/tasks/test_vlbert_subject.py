"""VL-BERT on tasks: what it reads, its heads and its losses against those of its release (spec VL-BERT §5)."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from xdscale.bench.padded_vlbert import padded
from xdscale.data.task_files import Example, Span
from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import load_settings
from xdscale.pretrained.language import load_language_encoder
from xdscale.pretrained.vlbert import from_bert, load_vlbert, save_pooler, save_release, save_vlbert
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.vlbert.schema import VLBERTSettings
from xdscale.shards.language import load_language_tokenizer
from xdscale.shards.regions import Detector, RegionTable
from xdscale.shards.sources.regions.source import RegionImage, build_regions
from xdscale.systems.contract import Slots
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import Finetuning
from xdscale.tasks.vcr import VCR_QA
from xdscale.tasks.vlbert import VLBERTSubject
from xdscale.tasks.vqa import VQA
from xdscale.training.engine import to_device

from ..models import padded_vlbert

WIDTH = 12
COUNTS = (3, 5, 2, 4)


def task_of(reads, **of):
    """A task whose own loss is 0: the model's takes its place."""
    values = {"name": "toy", "sentences": 1, "images": 1, "reads": reads, "choices": 0, "outputs": 3} | of
    none = torch.zeros(())
    values |= {"loss": lambda logits, targets, real: (none, none), "targets": of.get("targets", labels_of)}
    return SimpleNamespace(**values)


def labels_of(examples, regions=None):
    return np.array([example.label for example in examples])


def example(texts, images=(), spans=(), label=0):
    return Example("1", texts, label, 1, images, spans)


@pytest.fixture(scope="module", params=["none", "first"])
def table(request, tmp_path_factory):
    """Four pictures with 3, 5, 2 and 4 regions, of which the first one may be the whole image."""
    folder, rng = tmp_path_factory.mktemp("data") / "regions", np.random.default_rng(0)
    images = []
    for number, count in enumerate(COUNTS):
        corner = rng.uniform(0, 40, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 50, (count, 2))], 1).astype(np.float32)
        if request.param == "first":
            boxes[0] = 0, 0, 100, 120
        features = rng.standard_normal((count, WIDTH)).astype(np.float32)
        images.append(RegionImage(f"picture-{number}", size=(100, 120), boxes=boxes, features=features))
    build_regions(images, folder, Detector(model="drawn"), whole_image=request.param)
    return RegionTable.open(folder)


@pytest.fixture(scope="module")
def folder(cassette_model, tmp_path_factory):
    """A VL-BERT made of the 2-layer BERT, with heads, whose images count."""
    torch.manual_seed(0)
    out, spec = tmp_path_factory.mktemp("vlbert"), Language(name=str(cassette_model))
    model = from_bert(load_language_encoder(spec, dropout=0.1), appearance_size=WIDTH, masks_features=True)
    for name, parameter in model.named_parameters():
        if "visual_norm" in name or name.startswith(("regions", "region_tokens", "text_only")):
            torch.nn.init.normal_(parameter, std=0.3)
    size, state = model.config.hidden_size, {f"model.{name}": value for name, value in model.state_dict().items()}
    for name in ("mlm.transform", "masked_region.transform"):
        state |= {f"{name}.weight": torch.randn(size, size) * 0.1, f"{name}.bias": torch.randn(size) * 0.1}
    state |= {"mlm.norm.weight": torch.randn(size), "mlm.norm.bias": torch.randn(size)}
    save_vlbert(model.config, state, out)
    save_pooler(spec, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cassette_model / name, out)
    return out


@pytest.fixture
def read(folder, table):
    """Returns a task's first micro-batch, and the module with its head."""

    def of(task, examples, real=None, **settings):
        subject = VLBERTSubject(str(folder), VLBERTSettings(dropout=0.0, **settings), table)
        ids = np.arange(len(examples))
        batch = subject.collator(task, examples)(
            Slots(np.zeros_like(ids), ids, np.ones(len(ids), bool) if real is None else np.array(real))
        )
        torch.manual_seed(1)
        return batch, Finetuning(subject.build(task).eval(), task)

    return of


@pytest.fixture
def theirs(tmp_path):
    """Runs the release's module with the weights of ours: states of texts and of regions, and the pooled ones."""

    def of(module, batch):
        encoder = module.subject.encoder
        state = {f"model.{name}": value for name, value in encoder.state_dict().items()}
        save_release(state, tmp_path / "ours.model")
        with torch.no_grad():
            texts, regions, _, pooled = padded_vlbert.loaded(tmp_path / "ours.model", encoder.config)(
                padded(batch.arrays)
            )
        return texts, regions, pooled

    return of


def ours(module, batch):
    with torch.no_grad():
        found = module(to_device(batch.arrays, torch.device("cpu")))
    return found["logits"], found["task"].loss_sum


def test_an_open_question_is_answered_at_the_mask_behind_it(read, theirs, folder):
    """VQA: `[CLS] q [SEP] [MASK] [SEP]`, the masked-LM head's transform, and BCE summed over answers."""
    credits = np.array([[0, 0.3, 1, 0, 0, 0, 0], [0.6, 0, 0, 0, 0.9, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    task = task_of("answer", outputs=7, targets=lambda examples, regions=None: credits[: len(examples)])
    questions = ("what colour is the dog ?", "where ?", "is it a very large red bird that sits there ?")
    examples = [example(((text,),), (f"picture-{place}",)) for place, text in enumerate(questions)]
    batch, module = read(task, examples, real=[True, True, False])
    texts, _, _ = theirs(module, batch)
    _, heads = load_vlbert(folder)
    lengths = torch.from_numpy(batch.arrays["text_lengths"])
    states = texts[torch.arange(3), lengths - 2]
    hidden = F.gelu(F.linear(states, heads["mlm.transform.weight"], heads["mlm.transform.bias"]))
    hidden = F.layer_norm(hidden, hidden.shape[1:], heads["mlm.norm.weight"], heads["mlm.norm.bias"], 1e-12)
    wanted = F.linear(hidden, module.subject.classifier.weight, module.subject.classifier.bias)
    logits, loss = ours(module, batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    targets = torch.from_numpy(credits).float()
    by_release = F.binary_cross_entropy_with_logits(wanted[:2], targets[:2]) * 7  # a mean over the batch
    torch.testing.assert_close(loss / 2, by_release, atol=1e-5, rtol=1e-5)
    tokens, info = load_language_tokenizer(str(folder))
    first = batch.arrays["text_ids"][: lengths[0]].tolist()
    assert [tokens.id_to_token(one) for one in (first[0], *first[-3:])] == ["[CLS]", "[SEP]", "[MASK]", "[SEP]"]
    assert batch.arrays["text_segments"][: lengths[0]].tolist() == [0] * (len(first) - 2) + [1, 1]
    assert (batch.arrays["text_ids"] == info.mask_id).sum() == 3


def test_each_choice_is_right_or_wrong_by_itself(read, theirs, folder, table):
    """VCR: words that name an object look at it; per-choice BCE, a mean over the choices; BERT's pooler."""
    answers = ("jessie is", "no , he is not", "it is a dog", "on the table")
    about, shift = ("who is near the dog ?", Span(16, 19, 2)), int(table.build.whole_image == "none")
    spans = tuple((((about[1],), (Span(0, 6, 1),) if answer.startswith("jessie") else ())) for answer in answers)
    texts = tuple((about[0], answer) for answer in answers)
    examples = [example(texts, (f"picture-{place}",), spans, label) for place, label in ((1, 3), (3, 0))]
    batch, module = read(task_of("input", sentences=2, choices=4, outputs=1), examples)
    assert len(batch.arrays["text_lengths"]) == 8
    _, _, pooled = theirs(module, batch)
    wanted = F.linear(pooled, module.subject.classifier.weight, module.subject.classifier.bias).view(2, 4)
    logits, loss = ours(module, batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    right = torch.tensor([[0, 0, 0, 1], [1, 0, 0, 0]]).float()
    torch.testing.assert_close(loss / 2, F.binary_cross_entropy_with_logits(wanted, right), atol=1e-5, rtol=1e-5)
    tokens = load_language_tokenizer(str(folder))[0]
    length = batch.arrays["text_lengths"][0]
    words = [tokens.id_to_token(one) for one in batch.arrays["text_ids"][:length].tolist()]
    looks_at = dict(zip(words, batch.arrays["text_visual"][:length].tolist()))
    assert looks_at["dog"] == 2 + shift
    assert looks_at["who"] == looks_at["[CLS]"] == looks_at["near"] == 0
    assert {place for word, place in zip(words, batch.arrays["text_visual"]) if word in ("jessie", "jess", "##ie")} == {
        1 + shift
    }
    encoder = module.subject.encoder
    assert torch.equal(*encoder.embeddings.token_type_embeddings.weight[:2])
    bert = load_language_encoder(Language(name="package:cognition/model"), dropout=0.1)
    assert torch.equal(encoder.pooler.weight, bert.pooler.dense.weight) == (folder / "pooler.safetensors").is_file()


def test_a_pooler_of_another_model_is_refused(folder, table, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "model")
    save_file({"pooler.weight": torch.zeros(3, 3), "pooler.bias": torch.zeros(3)}, copied / "pooler.safetensors")
    with pytest.raises(
        XdscaleError, match=r"pooler\.safetensors: holds no fitting weights for pooler\.bias, pooler\.w"
    ):
        VLBERTSubject(str(copied), VLBERTSettings(), table).build(task_of("input", sentences=2, choices=4, outputs=1))


def test_as_the_paper_has_it_answers_and_choices_exclude_each_other(read):
    """Spec VL-BERT §8, 7 and 8: softmax cross-entropy; VQA's credits are weights of their answers' logarithms."""
    credits = np.array([[0, 0.3, 1, 0], [0, 0, 0, 0.6], [1, 0, 0, 0]])
    vqa = replace(VQA, labels=tuple("abcd"))
    own = {"targets": lambda examples, regions=None: credits[: len(examples)]}
    task = task_of("answer", outputs=4, **own)
    task.loss = vqa.loss
    examples = [example((("where ?",),), (f"picture-{place}",)) for place in range(3)]
    batch, module = read(task, examples, real=[True, True, False], loss="softmax")
    logits, loss = ours(module, batch)
    logarithms = logits.double().log_softmax(1)
    wanted = -(0.3 * logarithms[0, 1] + logarithms[0, 2] + 0.6 * logarithms[1, 3])
    entropies = -(0.3 * math.log(0.3) + 0.6 * math.log(0.6))  # of the credits, which no weight changes
    assert loss.item() == pytest.approx(wanted.item() - entropies, rel=1e-5)
    task = task_of("input", sentences=2, choices=4, outputs=1)
    task.loss = VCR_QA.loss
    texts = tuple(("who is it ?", answer) for answer in ("jessie", "no", "it is a dog", "on the table"))
    examples = [example(texts, (f"picture-{place}",), (), label) for place, label in ((1, 3), (3, 0))]
    batch, module = read(task, examples, loss="softmax")
    logits, loss = ours(module, batch)
    wanted = -logits.double().log_softmax(1)
    assert loss.item() == pytest.approx((wanted[0, 3] + wanted[1, 0]).item(), rel=1e-5)


def test_64_questions_are_256_sequences(read, tmp_path):
    """Spec VL-BERT fact 10: the release's batch of VCR, each question with its four choices."""
    questions = [
        {
            "annot_id": f"train-{number}", "img_fn": f"picture-{number % 4}", "metadata_fn": "none.json",
            "objects": ["person"] * (COUNTS[number % 4] - 1), "question": ["Is", [0], "here", "?"],
            "answer_choices": [["Yes"], ["No"], [[0], "is"], ["Maybe"]], "answer_label": number % 4,
            "rationale_choices": [["So"], ["it"], ["looks"], ["like"]], "rationale_label": 3 - number % 4,
        }
        for number in range(64)
    ]  # fmt: skip
    (tmp_path / "VCR").mkdir()
    for name in ("train", "val"):
        (tmp_path / "VCR" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, questions)))
    for name, recipe in (("vcr_qa", "vlbert-vcr-answer"), ("vcr_qar", "vlbert-vcr-rationale")):
        assert load_settings(recipe, []).training.global_batch == 64
        task = find_task(name)
        batch, _ = read(task, task.read(tmp_path).train)
        assert len(batch.arrays["cu_seqlens"]) - 1 == 256
        assert batch.targets == {"task": 64}
        assert batch.arrays["labels"].tolist() == [entry[task.label] for entry in questions]


def test_a_region_is_pointed_at(read, theirs, folder, table):
    """RefCOCO+: the region head's transform, one score for each region, BCE over them."""
    gold = np.array([[0, 0, 1, 0, 0], [0.5, 0.5, 0, 0, 0]])
    task = task_of("region", outputs=0, targets=lambda examples, regions=None: gold[: len(examples)])
    examples = [example((("the small dog",),), (f"picture-{place}",)) for place in (1, 2)]
    batch, module = read(task, examples)
    _, regions, _ = theirs(module, batch)
    _, heads = load_vlbert(folder)
    hidden = F.gelu(F.linear(regions, *(heads[f"masked_region.transform.{kind}"] for kind in ("weight", "bias"))))
    scores = F.linear(hidden, module.subject.classifier.weight, module.subject.classifier.bias)[:, :, 0]
    shift = int(table.build.whole_image == "none")
    assert regions.shape[1] == 5 + shift
    logits, loss = ours(module, batch)
    assert torch.isinf(logits[1, 2:]).all()
    torch.testing.assert_close(logits[0], scores[0, shift:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, :2], scores[1, shift : 2 + shift], atol=1e-5, rtol=1e-5)
    right = torch.from_numpy(gold > 0).float()
    wanted = sum(F.binary_cross_entropy_with_logits(logits[row, :n], right[row, :n]) for row, n in ((0, 5), (1, 2)))
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)


def test_a_text_alone_is_read_without_an_image(read, theirs):
    """And where there are no choices, the task's own loss counts."""
    batch, module = read(task_of("input", images=0), [example((("good",),)), example((("not so bad",),))])
    _, _, pooled = theirs(module, batch)
    wanted = F.linear(pooled, module.subject.classifier.weight, module.subject.classifier.bias)
    logits, loss = ours(module, batch)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert loss == 0
    assert batch.regions is None


def test_an_encoder_of_pixels_takes_what_a_table_says_of_the_whole_image(folder, table, tmp_path):
    """As its pretraining did; one of features takes the mean of the others, as its own did (spec §1.3)."""
    stored = table.read(np.array([1])).features
    for masks_features in (True, False):
        config = json.loads((folder / "config.json").read_text()) | {"masks_features": masks_features}
        (tmp_path / "config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / name, tmp_path)
        subject = VLBERTSubject(str(tmp_path), VLBERTSettings(weights="random"), table)
        collate = subject.collator(task_of("input"), [example((("good",),), ("picture-1",))])
        found = collate(Slots(np.zeros(1, int), np.zeros(1, int), np.ones(1, bool))).arrays["features"]
        whole, others = (stored[0], stored[1:]) if table.build.whole_image == "first" else (None, stored)
        np.testing.assert_array_equal(found[1:], others)
        if masks_features or whole is None:
            whole = others.astype(np.float32).mean(0)
        np.testing.assert_allclose(found[0], whole, atol=2e-3)


def test_every_trained_parameter_gets_a_gradient(read):
    for reads, outputs in (("answer", 7), ("region", 0), ("input", 3)):
        targets = {"answer": np.ones((1, 7)), "region": np.ones((1, 3)), "input": np.zeros(1, np.int64)}[reads]
        task = task_of(reads, outputs=outputs, targets=lambda examples, regions=None, found=targets: found)
        if reads == "input":
            task.loss = lambda logits, labels, real: (F.cross_entropy(logits, labels), labels.sum())
        batch, module = read(task, [example((("a dog",),), ("picture-0",))])
        module(to_device(batch.arrays, torch.device("cpu")))["task"].loss_sum.backward()
        assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def test_a_kept_model_brings_the_pooler_that_its_own_task_left_out(folder, table, tmp_path):
    """Else VCR after RefCOCO+ would begin with a random one."""
    source, out = shutil.copytree(folder, tmp_path / "source"), tmp_path / "kept"
    out.mkdir()
    size = load_vlbert(folder)[0].config.hidden_size
    pooler = {"pooler.weight": torch.randn(size, size), "pooler.bias": torch.randn(size)}
    save_file(pooler, source / "pooler.safetensors")
    subject = VLBERTSubject(str(source), VLBERTSettings(), table)
    task = task_of("region", outputs=0)
    said = subject.export(task, subject.build(task).state_dict(), out)
    assert said == "finetuned VL-BERT and the task's head"
    built = VLBERTSubject(str(out), VLBERTSettings(), table).build(task_of("input"))
    assert torch.equal(built.encoder.pooler.weight, pooler["pooler.weight"])
    assert torch.equal(built.encoder.pooler.bias, pooler["pooler.bias"])


def test_a_kept_model_begins_with_the_second_segment_that_its_task_trained(folder, table, tmp_path):
    """Pairs and answers train it. What never did begins with the first one, as after pretraining."""
    pair = task_of("input", sentences=2, choices=4, outputs=1)
    tasks = {"pair": pair, "answer": task_of("answer"), "region": task_of("region", outputs=0)}
    for path, trained in ((("pair",), True), (("answer",), True), (("region",), False), (("pair", "region"), True)):
        source = folder
        for name in path:
            subject, out = VLBERTSubject(str(source), VLBERTSettings(), table), tmp_path / "-".join((*path, "of", name))
            built = subject.build(tasks[name])
            with torch.no_grad():  # as training does to all of them
                built.encoder.embeddings.token_type_embeddings.weight += torch.randn(3, 1)
            out.mkdir()
            subject.export(tasks[name], built.state_dict(), out)
            source = out
        left = load_vlbert(source)[0].embeddings.token_type_embeddings.weight
        again = VLBERTSubject(str(source), VLBERTSettings(), table).build(pair).encoder.embeddings
        assert torch.equal(again.token_type_embeddings.weight[1], left[1 if trained else 0])
        assert torch.equal(again.token_type_embeddings.weight[[0, 2]], left[[0, 2]])
        assert not torch.equal(left[0], left[1])


@pytest.mark.parametrize("reads", ["answer", "region", "input"])
def test_a_loss_of_broken_weights_is_no_number(read, reads):
    """It must stop the run, and not look like a loss of 0."""
    targets = {"answer": np.ones((1, 3)), "region": np.ones((1, 3)), "input": np.zeros(1, np.int64)}[reads]
    more = {"answer": {}, "region": {"outputs": 0}, "input": {"choices": 3, "outputs": 1}}[reads]
    task = task_of(reads, targets=lambda examples, regions=None: targets, **more)
    texts = (("a dog",),) * (3 if reads == "input" else 1)
    batch, module = read(task, [example(texts, ("picture-0",))])
    with torch.no_grad():
        module.subject.classifier.bias[0] = torch.nan
    logits, loss = ours(module, batch)
    assert logits.shape == (1, 3)
    assert loss.isnan()


def test_what_does_not_fit_is_refused(read, table, folder, tmp_path):
    with pytest.raises(XdscaleError, match="--task nlvr2: VL-BERT reads one image, not 2"):
        VLBERTSubject(str(folder), VLBERTSettings(), table).require_readable(find_task("nlvr2"))
    with pytest.raises(XdscaleError, match=r"model\.max_length = 511: .* has 510 positions for a text"):
        VLBERTSubject(str(folder), VLBERTSettings(max_length=511), table).describe()
    VLBERTSubject(str(folder), VLBERTSettings(max_length=510), table).describe()
    subject, text = VLBERTSubject(str(folder), VLBERTSettings(), table), "a dog on a table"
    part, whole = (
        [example(((text,),), ("picture-1",), (((Span(0, end, -1),),),))] for end in (len("a dog"), len(text))
    )
    with pytest.raises(XdscaleError, match="--task toy: VL-BERT points at what a whole text speaks of"):
        subject.collator(task_of("region"), part)
    subject.collator(task_of("region"), whole)
    narrow = np.zeros((1, 5), np.float32)
    image = RegionImage("a", size=(9, 9), boxes=np.array([[0, 0, 5, 5]], np.float32), features=narrow)
    build_regions([image], tmp_path / "narrow", Detector(model="drawn"))
    subject = VLBERTSubject(str(folder), VLBERTSettings(), RegionTable.open(tmp_path / "narrow"))
    with pytest.raises(XdscaleError, match=r"features of 5 numbers; .* reads 12 of each region"):
        subject.collator(task_of("input"), [example((("good",),), ("a",))])


def test_a_kept_model_says_what_its_outputs_stand_for(folder, table, tmp_path):
    """VQA's answers, of which nothing else that is kept says which is which."""
    subject, task = VLBERTSubject(str(folder), VLBERTSettings(), table), task_of("answer", labels=("2", "a dog", "red"))
    subject.export(task, subject.build(task).state_dict(), tmp_path)
    assert load_vlbert(tmp_path)[0].config.id2label == {0: "2", 1: "a dog", 2: "red"}


def test_a_model_trained_from_pixels_is_told_of_features_that_are_not_of_its_branch(folder, region_table, tmp_path):
    copied, branch = shutil.copytree(folder, tmp_path / "model"), tmp_path / "model" / "fast_rcnn.safetensors"
    save_file({"conv1.weight": torch.ones(2)}, branch)
    (note,) = VLBERTSubject(str(copied), VLBERTSettings(), region_table).notes()
    assert "features of drawn, but " in note
    assert "on those of vlbert:resnet101 (weights " in note
    own = Detector(model="vlbert:resnet50", sha256=hashlib.sha256(branch.read_bytes()).hexdigest())
    image = RegionImage("a", (9, 9), np.array([[0, 0, 5, 5]], np.float32), np.zeros((1, WIDTH), np.float32))
    build_regions([image], tmp_path / "own", own)
    assert VLBERTSubject(str(copied), VLBERTSettings(), RegionTable.open(tmp_path / "own")).notes() == []
    assert VLBERTSubject(str(folder), VLBERTSettings(), region_table).notes() == []
