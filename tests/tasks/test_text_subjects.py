"""What is finetuned on texts is built and read as the settings say."""

import pytest

from xdscale.errors import XdscaleError
from xdscale.names import resolve_path
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip, LanguageSettings
from xdscale.tasks import text_subjects
from xdscale.tasks.contract import find_task
from xdscale.tasks.text_subjects import ClipSubject, CrossModalSubject, LanguageSubject

TASK, SHA256 = find_task("rte"), "0" * 64


@pytest.fixture
def called(monkeypatch):
    """What each of the module's functions is called with; it returns its name."""
    calls = {}

    def replace(name):
        def function(*given, **options):
            calls[name] = given, options
            return name

        monkeypatch.setattr(text_subjects, name, function)

    for kind in ("language", "cross_modal", "clip"):
        replace(f"build_{kind}_classifier")
    for name in ("encode_examples", "TaskCollator", "ClipBPE", "describe_clip_tokenizer"):
        replace(name)
    monkeypatch.setattr(text_subjects, "own_tokenizer", lambda name: (f"tokenizer of {name}", f"ids of {name}"))
    return calls


def test_weights_and_dropout_are_those_of_the_settings(called, tmp_path):
    settings = {
        weights: LanguageSettings(dropout=0.3, weights=weights, clip_weights="w")
        for weights in ("pretrained", "random")
    }
    LanguageSubject("m", settings["pretrained"]).build(TASK, sha256=SHA256)
    assert called["build_language_classifier"] == ((Language(name="m", sha256=SHA256), TASK), {"dropout": 0.3})
    LanguageSubject("m", settings["random"]).build(TASK, sha256=SHA256)
    assert called["build_language_classifier"] == ((Language(name="m", weights="random"), TASK), {"dropout": 0.3})
    for weights, wanted in (("pretrained", "w"), ("random", "random")):
        ClipSubject("ViT-B-32", settings[weights]).build(TASK)
        assert called["build_clip_classifier"] == ((Clip(name="ViT-B-32", weights=wanted), TASK), {"dropout": 0.3})
    CrossModalSubject(str(tmp_path), settings["pretrained"]).build(TASK, sha256=SHA256)
    assert called["build_cross_modal_classifier"] == ((resolve_path(str(tmp_path)), TASK), {"dropout": 0.3})


@pytest.mark.parametrize(
    ("subject", "language", "clip"),
    [(LanguageSubject, True, False), (CrossModalSubject, True, True), (ClipSubject, False, True)],
)
def test_texts_are_split_for_the_encoders_that_read_them(called, subject, language, clip):
    subject("m", LanguageSettings(max_length=77)).collator(TASK, ["example"])
    tokenizer, ids = ("tokenizer of m", "ids of m") if language else (None, None)
    bpe, clip_ids = ("ClipBPE", "describe_clip_tokenizer") if clip else (None, None)
    assert called["encode_examples"] == ((["example"], TASK.targets, tokenizer, bpe), {})
    assert called["TaskCollator"] == (("encode_examples", ids, clip_ids), {"max_length": 77})


def test_texts_may_be_as_long_as_the_encoder_has_positions(cassette_model):
    assert LanguageSubject(str(cassette_model), LanguageSettings(max_length=512)).describe().hidden_size == 128
    with pytest.raises(XdscaleError, match=r"model\.max_length = 513: .* has 512 positions"):
        LanguageSubject(str(cassette_model), LanguageSettings(max_length=513)).describe()


def test_clip_is_described_with_the_weights_of_the_settings(tmp_path):
    (weights := tmp_path / "w.pt").touch()
    found = ClipSubject("ViT-B-32", LanguageSettings(clip_weights=str(weights))).describe()
    assert (found.hidden_size, found.weights) == (512, [weights])
    assert ClipSubject("ViT-B-32", LanguageSettings(clip_weights="random")).describe().weights is None
