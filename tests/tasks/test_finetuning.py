"""Subjects and heads, against transformers' own classes with the same weights."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from xdscale.errors import XdscaleError
from xdscale.finetune.run import FinetuneSystem, freeze_pooler
from xdscale.models.operations import ActivatedLinear, PackedAttention, ResidualNorm
from xdscale.models.xdbert import XDBERT
from xdscale.pretrained.clip import build_clip_text_tower
from xdscale.pretrained.language import load_language_encoder
from xdscale.recipe import Optim
from xdscale.recipes.mlm.schema import Language, MaskedLMRecipe
from xdscale.recipes.xdbert.schema import Clip, LanguageSettings
from xdscale.systems.xdbert import build_adaptation, build_model, join_encoders
from xdscale.tasks.contract import find_task
from xdscale.tasks.finetuning import (
    Finetuning,
    build_clip_classifier,
    build_cross_modal_classifier,
    build_language_classifier,
)
from xdscale.tasks.subjects import CrossModalClassifier
from xdscale.tasks.text_subjects import LanguageSubject
from xdscale.training.engine import to_device
from xdscale.training.optimizer import build_optimizer
from xdscale.training.stored import save_full_model


@pytest.fixture(scope="module")
def make_batch(task_arrays):
    return lambda *of: to_device(task_arrays(*of), torch.device("cpu"))


@pytest.fixture(scope="module")
def electra_folder(cassette_model, tmp_path_factory):
    """A small ELECTRA as a Hugging Face folder; no registry package ships a pretrained English one."""
    folder = tmp_path_factory.mktemp("electra")
    torch.manual_seed(0)
    config = ElectraConfig(hidden_size=64, embedding_size=32, num_hidden_layers=2, num_attention_heads=2)
    ElectraForSequenceClassification(config).save_pretrained(folder)
    shutil.copy(cassette_model / "tokenizer.json", folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "electra"])
@pytest.mark.parametrize(("task", "labels"), [("mnli", [2, 0, 1]), ("cola", [1, 0, 1]), ("swag", [3, 1, 0])])
def test_logits_are_those_of_transformers_own_model(
    cassette_model, electra_folder, make_batch, tmp_path, family, task, labels
):
    """Also of the one that it reads where the finetuned model was kept (run.keep_model)."""
    folder = cassette_model if family == "bert" else electra_folder
    torch.manual_seed(1)
    module = Finetuning(
        build_language_classifier(Language(name=str(folder)), find_task(task), dropout=0.1), find_task(task)
    ).eval()
    kind = AutoModelForMultipleChoice if task == "swag" else AutoModelForSequenceClassification
    reference = kind.from_pretrained(
        folder, num_labels=find_task(task).outputs, attn_implementation="eager", ignore_mismatched_sizes=True
    ).eval()
    subject = LanguageSubject(str(folder), LanguageSettings(dropout=0.25))
    state = module.subject.state_dict()
    said = subject.export(find_task(task), state, tmp_path)
    kept = kind.from_pretrained(tmp_path).eval()
    assert said == f"finetuned {type(kept).__name__}"
    words = {"mnli": "entailment", "cola": "0", "swag": "LABEL_0"}
    assert kept.config.id2label[0] == words[task]
    dropout = {"hidden_dropout_prob", "attention_probs_dropout_prob"} | (
        {"summary_last_dropout"} & {*vars(kept.config)}
    )
    assert {getattr(kept.config, name) for name in dropout} == {0.25}
    assert kept.config.problem_type == (None if task == "swag" else "single_label_classification")
    assert AutoTokenizer.from_pretrained(tmp_path)("a dog").input_ids[0] == 101
    heads = {k: v for k, v in module.subject.model.state_dict().items() if not k.startswith(f"{family}.")}
    pooler = {k: v for k, v in module.subject.model.state_dict().items() if ".pooler." in k}  # the file has none
    found = reference.load_state_dict(heads | pooler, strict=False)
    assert heads
    assert not found.unexpected_keys
    batch = make_batch(task, labels)
    given = {"input_ids": batch["language_ids"], "attention_mask": batch["language_mask"].long()}
    given |= {"token_type_ids": batch["segments"], "labels": batch["labels"]}
    with torch.no_grad():
        terms = module(batch)
        for model in (reference, kept):
            wanted = model(**given)
            torch.testing.assert_close(terms["logits"], wanted.logits.view_as(terms["logits"]), atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(terms["task"][0] / len(labels), wanted.loss, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["language", "cross-modal", "clip"])
def test_the_head_alone_can_have_another_rate(cassette_model, adaptation_spec, tmp_path, kind):
    """As `xdscale recipes --finetuning paper` says: optim.rate_factors={head: 10}."""
    task = find_task("cola")
    if kind == "language":
        subject = build_language_classifier(Language(name=str(cassette_model)), task, dropout=0.1)
        head = [subject.model.classifier]
    elif kind == "clip":
        subject = build_clip_classifier(Clip(name="clip-tiny.json", weights="random"), task, dropout=0.1)
        head = [subject.classifier]
    else:
        subject = CrossModalClassifier(build_model(adaptation_spec().model), 2, dropout=0.1)
        head = [subject.pooler, subject.classifier]
    module = Finetuning(subject, task)
    parts = FinetuneSystem.parts(None, module)
    groups = build_optimizer(module, Optim(rate_factors={"head": 10}), parts).param_groups
    found = {group["rate_factor"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert found[10] == {id(parameter) for part in head for parameter in part.parameters()}
    assert found.keys() == {1, 10}


def test_parameters_are_the_encoders_and_the_heads(cassette_model):
    """Spec xdbert §10.9: exactly the encoder and its head."""
    module = build_language_classifier(Language(name=str(cassette_model)), find_task("mnli"), dropout=0.1)
    config = BertConfig.from_pretrained(cassette_model, num_labels=3)
    reference = AutoModelForSequenceClassification.from_config(config)
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in reference.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_any_split_of_a_batch_gives_the_same_gradient(cassette_model, make_batch):
    labels = [5.0, 0.25, 3.5, 2.0]
    torch.manual_seed(2)
    module = Finetuning(
        build_language_classifier(Language(name=str(cassette_model)), find_task("stsb"), dropout=0.0),
        find_task("stsb"),
    )
    weight = module.subject.model.classifier.weight
    (loss, _) = module(make_batch("stsb", labels))["task"]
    (whole,) = torch.autograd.grad(loss / 4, weight)
    parts = 0
    for order in ([0, 2], [1], [3]):
        (loss, _) = module(make_batch("stsb", labels, order))["task"]
        parts = parts + torch.autograd.grad(loss / 4, weight)[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_padding_examples_have_no_part_in_the_loss(cassette_model, make_batch):
    for task, labels in (("stsb", [5.0, 0.25]), ("rte", [1, 0])):
        spec = find_task(task)
        torch.manual_seed(3)
        module = Finetuning(
            build_language_classifier(Language(name=str(cassette_model)), spec, dropout=0.0),
            spec,
        ).eval()
        batch = make_batch(task, labels)
        logits = module(batch)["logits"].double()
        targets = batch["labels"]
        both = (logits[:, 0] - targets) ** 2 if spec.regression else -logits.log_softmax(1)[range(2), targets]
        torch.testing.assert_close(module(batch)["task"][0].double(), both.sum(), atol=1e-5, rtol=1e-5)
        batch["real"][1] = False
        if not spec.regression:
            batch["labels"][1] = -1
        torch.testing.assert_close(module(batch)["task"][0].double(), both[0], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def export_folder(adaptation_spec, cassette_model, tmp_path_factory):
    """The full model of an adaptation as `xdscale export` lays it out, and the module it came from."""
    folder = tmp_path_factory.mktemp("export")
    spec = adaptation_spec(dropout=0.1)
    torch.manual_seed(4)
    adaptation = build_adaptation(spec)
    save_full_model(spec, adaptation.state_dict(), folder / "cross_modal")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((cassette_model / name).read_bytes())
    return folder, adaptation


def test_the_full_model_is_the_adapted_one_with_a_bert_pooler_on_its_first_output(export_folder, make_batch):
    """Table 8; appendix B: 2 blocks for one sentence, 4 for a pair."""
    folder, adaptation = export_folder
    encoder: XDBERT = adaptation.model.eval()
    for task, blocks in (("cola", 2), ("rte", 4)):
        subject = build_cross_modal_classifier(folder, find_task(task), dropout=0.1)
        batch = make_batch(task, [1, 0, 1])
        assert batch["clip_ids"].shape == (3, blocks, 77)
        with torch.no_grad():
            logits = Finetuning(subject, find_task(task)).eval()(batch)["logits"]
            language, _ = encoder(
                batch["language_ids"],
                batch["clip_ids"],
                batch["clip_lengths"],
                batch["language_mask"],
                batch["segments"],
            )
            pooled = torch.tanh(adaptation.match.pooler(language[:, 0]))
        torch.testing.assert_close(logits, subject.classifier(pooled), atol=2e-5, rtol=1e-5)


def test_dropout_is_finetunings_in_all_parts_of_the_full_model(export_folder):
    """It was adapted with 0.1."""
    modules = list(build_cross_modal_classifier(export_folder[0], find_task("cola"), dropout=0.3).modules())
    rates = {module.p for module in modules if isinstance(module, nn.Dropout)}
    assert rates | {module.dropout for module in modules if isinstance(module, ResidualNorm | PackedAttention)} == {0.3}


def test_clips_activation_is_the_one_that_its_weights_were_trained_with(adaptation_spec, cassette_model, tmp_path):
    """LAION's ViT-B-32 was trained with GELU, OpenAI's with QuickGELU; an export says what it was adapted with."""
    spec = adaptation_spec(dropout=0.1)
    clip = spec.model.clip.model_copy(update={"name": "ViT-B-32", "weights": "laion2b_s34b_b79k"})
    spec = spec.model_copy(update={"model": spec.model.model_copy(update={"clip": clip})})
    language = load_language_encoder(spec.model.language, dropout=0.1)
    model = nn.ModuleDict({"model": join_encoders(spec.model, language, build_clip_text_tower(clip))})
    save_full_model(spec, model.state_dict(), tmp_path / "cross_modal")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((cassette_model / name).read_bytes())
    subject = build_cross_modal_classifier(tmp_path, find_task("cola"), dropout=0.1)
    activations = {part.activation for part in subject.encoder.clip.modules() if isinstance(part, ActivatedLinear)}
    assert activations == {F.gelu}


def test_an_export_without_the_full_model_is_refused(tmp_path):
    with pytest.raises(XdscaleError, match="holds no cross_modal/config.json"):
        build_cross_modal_classifier(tmp_path, find_task("cola"), dropout=0.1)


def test_clip_alone_is_read_at_the_end_token_and_knows_no_later_padding(clip_tiny, make_batch):
    """Paper §2.2: CLIP's own output, at EOT, projected."""
    torch.manual_seed(5)
    spec = Clip(name=str(clip_tiny), weights="random")
    subject = build_clip_classifier(spec, find_task("rte"), dropout=0.0).eval()
    batch = make_batch("rte", [1, 0])
    with torch.no_grad():
        logits = subject(batch)
        states = subject.encoder(batch["clip_ids"]).view(2, 4, 77, -1)
        sentences = [states[:, block][range(2), batch["clip_lengths"][:, block] - 1] for block in (0, 2)]
        batch["clip_ids"][:, 0, -1] = 7  # behind the end token
        again = subject(batch)
    torch.testing.assert_close(logits, subject.classifier(torch.cat(sentences, 1)), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits, again)


def test_an_export_of_another_system_is_no_cross_modal_model(tmp_path):
    (tmp_path / "cross_modal").mkdir()
    recipe = MaskedLMRecipe(
        system="mlm",
        model={"language": {"name": "bert-base-uncased"}},
        data={"shards": "d"},
        training={"steps": 1, "global_batch": 1},
        output={"folder": "r"},
    )
    config = {"recipe": recipe.model_dump(mode="json"), "tied_weights": {}}
    (tmp_path / "cross_modal" / "config.json").write_text(json.dumps(config))
    with pytest.raises(XdscaleError, match="was trained as 'mlm': there is no cross-modal model in it"):
        build_cross_modal_classifier(tmp_path, find_task("rte"), dropout=0.1)


def test_a_pooler_that_is_not_trained_stays_as_it_was(cassette_model):
    module = Finetuning(
        build_language_classifier(Language(name=str(cassette_model)), find_task("rte"), dropout=0.1), find_task("rte")
    )
    freeze_pooler(module)
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"subject.model.bert.pooler.dense.{kind}" for kind in ("weight", "bias")}
    clip = build_clip_classifier(Clip(name="clip-tiny.json", weights="random"), find_task("rte"), dropout=0.1)
    with pytest.raises(XdscaleError, match="this model has no pooler"):
        freeze_pooler(Finetuning(clip, find_task("rte")))
