"""Finetuning recipes against the paper's numbers."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from xdscale.data.task_files import Example
from xdscale.errors import XdscaleError
from xdscale.finetune.command import default_ds_config, describe_subject
from xdscale.finetune.recipe import RunSettings, TaskSection, check_tasks, load_settings, resolve_run
from xdscale.finetune.run import _notes_on_length, _settings
from xdscale.recipe import Run
from xdscale.recipes.xdbert.schema import ClipSettings, LanguageSettings
from xdscale.tasks.contract import SHIPPED, TaskData, find_task
from xdscale.tasks.own import OwnTask
from xdscale.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("size", "small", "others"), [("base", 1e-4, 2e-5), ("large", 5e-5, 1e-5)])
def test_learning_rates_are_those_of_table_5(size, small, others):
    settings = load_settings("paper", [])
    found = {name: settings.learning_rate(name, size) for name in SHIPPED}
    assert found == {name: small if name in ("rte", "mrpc", "stsb") else others for name in SHIPPED}


@pytest.mark.parametrize(("weights", "same"), [("ab" * 32, True), (None, False)])
def test_a_model_that_was_moved_is_the_same_where_its_weights_are_known(tmp_path, weights, same):
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * 9, {}, {}, {}, {})
    of_run = {"source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    here, there, other = (
        resolve_run(
            load_settings("paper", []),
            data,
            subject={"name": name, "subject": "language", "size": "base", "weights_sha256": sha256},
            **of_run,
        )
        for name, sha256 in (("exports/m", weights), ("/home/m/", weights), ("exports/m", "cd" * 32))
    )
    assert (here.identity() == there.identity()) is same
    assert here.identity() != other.identity()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(here.model_dump(mode="json")))
    with nullcontext() if same else pytest.raises(XdscaleError, match=r"model\.name was 'exports/m', now '/home/m/'"):
        RunFolder(tmp_path).check(there)


def test_schedule_and_seeds_are_the_papers():
    """Appendix C.2 and Table 1: 3 epochs, warm-up .1, length 128, 9 seeds for RTE, 5 for the others."""
    settings = load_settings("paper", [])
    assert (settings.training.epochs, settings.optim.warmup_ratio, settings.model.max_length) == (3, 0.1, 128)
    assert {settings.seeds_of(name) for name in SHIPPED if name != "rte"} == {5}
    assert settings.seeds_of("rte") == 9


@pytest.mark.parametrize(("examples", "steps", "per_epoch"), [(2490, 234, 78), (3668, 344, 115), (10, 1, 1)])
def test_epochs_become_steps(examples, steps, per_epoch, tmp_path):
    """RTE and MRPC have 2,490 and 3,668 training examples: 3 epochs of 32."""
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * examples, {}, {}, {}, {})
    subject = {"name": "m", "subject": "language", "size": "base", "weights_sha256": None}
    of_run = {"subject": subject, "source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    run = resolve_run(load_settings("paper", []), data, **of_run)
    assert (run.training.steps, run.run.eval_every, run.training.seed) == (steps, per_epoch, 3)
    assert run.optim.learning_rate == 1e-4
    if examples > 2**31 / 1e6:
        fitting, least, long = (
            load_settings("paper", [f"training.epochs={epochs!r}", "training.global_batch=1"])
            for epochs in ((2**31 - 1) / examples, 2**31 / examples, 1e6)
        )
        assert resolve_run(fitting, data, **of_run).training.steps == 2**31 - 1
        with pytest.raises(XdscaleError, match="are 2,147,483,648 steps of 1 ex"):
            resolve_run(least, data, **of_run)
        with pytest.raises(XdscaleError, match=r"^rte: training.epochs = 1e\+06 are [\d,]+,000,000 steps of 1 ex"):
            resolve_run(long, data, **of_run)
    assert type(run).model_validate(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        *((f"optim.learning_rate={rate}", "optim.learning_rate") for rate in ("-1", "0", ".nan", ".inf", "true")),
        ("optim.learning_rate={base: {others: true}, large: {others: 1}}", r"optim.learning_rate.*others = True"),
        ("optim.learning_rate={base: {others: -1}, large: {others: 1}}", r"optim.learning_rate.*others = -1"),
        ("seeds={others: true}", "seeds.others = True"),
        ("seeds=3", r"seeds = 3: Input should be a valid dictionary, \{NAME: VALUE\}$"),
        ("optim.learning_rate=x", r"optim\.learning_rate = 'x': .* valid number, or: .* dictionary, \{NAME: VALUE\}$"),
        (
            "optim.learning_rate={bsae: {others: 1}}",
            r".*\nthe command line: optim\.learning_rate\.bsae = 'bsae': .*'base'",
        ),
        ("seeds={others: 1000000000}", "seeds.others = 1000000000"),
        *((f"training.epochs={epochs}", "training.epochs = ") for epochs in (".inf", "1e300", "1e12")),
        ("training.global_batch=99999999999", "training.global_batch = 99999999999"),
        ("training.best=accuracy", "training.best = 'accuracy': Input should be 'loss/task' or 'accuracy/task'"),
        ("training.patience=2", "training.patience = 2: .*training.best must name the figure"),
    ],
)
def test_what_no_run_could_be_trained_with_is_refused_before_any(override, problem):
    with pytest.raises(XdscaleError, match=f"(?s)^the command line: {problem}"):
        load_settings("paper", [override])


def test_models_of_the_best_and_of_the_last_weights_are_not_comparable(tmp_path):
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * 10, {}, {}, {}, {})
    subject = {"name": "m", "subject": "language", "size": "base", "weights_sha256": None}
    of_run = {"subject": subject, "source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    chosen = ["training.best=accuracy/task", "training.patience=2"]
    last, best = (_settings(resolve_run(load_settings("paper", more), data, **of_run), {}) for more in ([], chosen))
    assert best == last | {"best": "accuracy/task", "patience": 2}
    visual = load_settings("visualbert-vqa", []), load_settings("visualbert-vqa", ["model.freeze_pooler=false"])
    of_run["subject"] = subject | {"subject": "visualbert"}
    frozen, free = (_settings(resolve_run(settings, data, **of_run), {}) for settings in visual)
    assert frozen == free | {"freeze_pooler": True}


def test_what_must_be_equal_is_what_a_text_model_was_trained_with(tmp_path):
    """What other models have beside it is no part of it: results of before such options stay comparable."""
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * 10, {}, {}, {}, {})
    subject = {"name": "m", "subject": "language", "size": "base", "weights_sha256": None}
    of_run = {"subject": subject, "source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    run = resolve_run(load_settings("paper", []), data, **of_run)
    optim = run.optim.model_dump(mode="json")
    assert _settings(run, {}) == optim | {
        "format": 1,
        "epochs": 3,
        "steps": 1,
        "global_batch": 32,
        "max_length": 128,
        "clip_blocks_per_sentence": 2,
        "dropout": 0.1,
        "precision": "fp32",
    }


def test_models_of_other_losses_or_of_mirrored_images_are_not_comparable(tmp_path):
    data = TaskData(find_task("rte"), [Example("0", (("a", "b"),), 0, 1)] * 10, {}, {}, {}, {})
    subject = {"name": "m", "subject": "vlbert", "size": "base", "weights_sha256": None}
    of_run = {"subject": subject, "source": tmp_path, "seed": 3, "label": "m", "folder": tmp_path / "r"}
    more = {"loss": "softmax", "flip": 0.5, "swap_words": False, "object_loss": 1.0, "object_masks": "output"}
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in more.items()]
    plain, other = (
        _settings(resolve_run(load_settings("vlbert-vcr-answer", chosen), data, **of_run), {})
        for chosen in ([], overrides)
    )
    assert other == plain | more


@pytest.mark.parametrize(("task", "regions"), [("vqa", "r"), ("rte", None)])
def test_all_that_is_asked_for_stands_in_a_runs_recipe(task, regions, tmp_path):
    data = TaskData(find_task(task), [Example("0", (("a", "b"),), 0, 1)] * 10, {}, {}, {}, {})
    subject = {"name": "m", "subject": "vlbert", "size": "large", "weights_sha256": "0" * 64, "encoder": "in words"}
    asked = ["training.global_batch=5", "training.epochs=2", "optim.momentum=0.5", "optim.optimizer=sgd"]
    asked += ["run.eval_samples=7", "run.keep_model=true", "run.stop_at_step=2", "model.max_length=99"]
    own = OwnTask(name="mine", train="t.tsv", dev="d.tsv")
    settings = load_settings("vlbert-vqa", asked)
    where = {"source": tmp_path / "data", "regions": "r", "folder": tmp_path / "run"}
    run = resolve_run(settings, data, subject=subject, seed=3, label="l", own=own, **where)
    assert run.model.model_dump(include={"name", "subject", "size", "weights_sha256", "max_length"}) == {
        "name": "m",
        "subject": "vlbert",
        "size": "large",
        "weights_sha256": "0" * 64,
        "max_length": 99,
    }
    assert run.data.model_dump() == {"folder": str(tmp_path / "data"), "regions": regions}
    assert (run.task.name, run.task.epochs, run.task.own) == (task, 2, own)
    assert (run.training.steps, run.training.seed, run.training.global_batch) == (4, 3, 5)
    assert (run.optim.optimizer, run.optim.momentum) == ("sgd", 0.5)
    assert (run.run.label, run.run.keep_model, run.run.stop_at_step) == ("l", True, 2)
    assert (run.run.eval_samples, run.run.eval_every) == (7, 2)
    assert run.output.folder == str(tmp_path / "run")


def test_only_files_with_examples_that_are_cut_are_told_of():
    class Split(list):
        def __init__(self, count, *cut):
            super().__init__(range(count))
            self.first_cut = lambda: cut

    examples = [Example("0", (("a", "b"),), 0, line) for line in range(1, 9)]
    files = {"train": "CoLA/train.tsv", "dev": "CoLA/dev.tsv", "CoLA.tsv": "CoLA/test.tsv"}
    data = SimpleNamespace(train=examples, dev={"dev": examples}, test={"CoLA.tsv": examples}, sources=files)
    cut = SimpleNamespace(
        data=data, train=Split(8, 2, 6), dev={"dev": Split(8, 0, None)}, test={"CoLA.tsv": Split(8, 1, 0)}
    )
    assert _notes_on_length(cut, 99) == [
        "CoLA/train.tsv: 2 of 8 examples have more than 99 tokens and are cut, the first in line 7",
        "CoLA/test.tsv: 1 of 8 examples have more than 99 tokens and are cut, the first in line 1",
    ]


def test_a_single_example_may_be_validated_on():
    assert load_settings("paper", ["run.eval_samples=1"]).run.eval_samples == 1
    with pytest.raises(XdscaleError, match="run.eval_samples = 0"):
        load_settings("paper", ["run.eval_samples=0"])


def test_one_learning_rate_for_all_can_be_given():
    settings = load_settings("paper", ["optim.learning_rate=3e-5", "seeds.cola=2"])
    assert {settings.learning_rate(name, "large") for name in SHIPPED} == {3e-5}
    assert settings.seeds_of("cola") == 2


def test_settings_for_a_task_that_is_not_asked_for_are_told_and_mistyped_names_refused(capsys):
    settings = load_settings("quickstart", ["seeds.reviews=2"])
    assert (settings.seeds_of("reviews"), settings.seeds_of("verdicts")) == (2, 3)
    check_tasks("quickstart", settings, ["cola", "reviews"])
    assert capsys.readouterr().err == ""
    check_tasks("quickstart", settings, ["cola"])
    assert capsys.readouterr().err == "warning: quickstart: seeds: 'reviews' is no task of this command\n"
    with pytest.raises(XdscaleError, match="seeds: unknown task 'reviews'; did you mean 'review'"):
        check_tasks("quickstart", settings, ["cola", "review"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate={base: {others: 1}}", "optim.learning_rate has no 'large'; it has base and large"),
        ("optim.learning_rate={large: {others: 1}}", "optim.learning_rate has no 'base'; it has base and large"),
        (
            "optim.learning_rate={base: {rte: 1}, large: {others: 1}}",
            "optim.learning_rate.base: no value for 'others'",
        ),
        ("seeds={rte: 2}", None),  # those of the recipe for the others stay
    ],
)
def test_a_table_has_both_sizes_and_a_value_for_all_others(override, message, tmp_path):
    text = (ROOT / "xdscale" / "recipes" / "finetune" / "paper.yaml").read_text()
    stated = yaml.safe_load(text)
    key, _, value = override.partition("=")
    section, name = stated, key
    if "." in key:
        section, name = stated[key.split(".")[0]], key.split(".")[1]
    section[name] = yaml.safe_load(value)
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(stated))
    message = message or "seeds: no value for 'others'"
    with pytest.raises(XdscaleError, match=rf"^{path}: {message}$"):
        load_settings(str(path), [])


def test_a_run_of_a_task_of_ones_own_finds_it_in_its_recipe():
    own = OwnTask(name="mine", title="Mine", train="t.tsv", dev="d.tsv", text="text", target="score", metrics="rmse")
    found = TaskSection(name="mine", epochs=1, own=own).find()
    assert (found.name, found.title, found.train, found.label) == ("mine", "Mine", "t.tsv", "score")
    assert TaskSection(name="rte", epochs=1).find() is find_task("rte")
    with pytest.raises(XdscaleError, match="task.own"):
        TaskSection(name="mine", epochs=1, own=OwnTask(name="mine", train="t.tsv", dev="d.tsv")).find()


def test_the_shipped_deepspeed_config_is_the_commands_default_on_gpus():
    assert json.loads((ROOT / "ds_configs" / "finetune-zero1.json").read_text()) == default_ds_config(gpu=True)


def test_the_default_for_a_gpu_without_bf16_is_fp16():
    values, fp16 = default_ds_config(gpu=True), default_ds_config(gpu=True, bf16=False)
    assert (values.pop("bf16"), fp16.pop("fp16")) == ({"enabled": True}, {"enabled": True})
    assert values == fp16
    smaller = default_ds_config(gpu=True, micro_batch=4)
    assert smaller == default_ds_config(gpu=True) | {"train_micro_batch_size_per_gpu": 4}


@pytest.mark.parametrize(
    ("name", "epochs", "batch"),
    [
        ("vqa", 10, 64),
        ("nlvr2", 10, 64),
        ("vcr-answer", 8, 32),
        ("vcr-rationale", 12, 32),
        ("flickr30k", 5, 32),
        ("vcr-answer-e2e", 8, 32),
        ("vcr-rationale-e2e", 12, 32),
    ],
)
def test_visualberts_settings_are_those_of_its_release(name, epochs, batch):
    """Spec VisualBERT §4: BertAdam at 2e-5 with the pooler left out, and the best of at most so many epochs."""
    settings = load_settings(f"visualbert-{name}", [])
    optim, training = settings.optim, settings.training
    assert (training.epochs, training.global_batch, training.patience, training.best) == (
        epochs, batch, 3, "accuracy/task",
    )  # fmt: skip
    assert (optim.learning_rate, optim.bias_correction, optim.eps, optim.betas) == (2e-5, False, 1e-6, (0.9, 0.999))
    assert (optim.weight_decay, optim.decayed, optim.warmup_ratio) == (0.01, "weights", 0.1)
    assert settings.model.freeze_pooler
    pixels = settings.model.pixels
    assert (pixels is not None) == name.endswith("e2e")
    if pixels is not None:  # §3: images of 768 × 384
        assert (pixels.long_side, pixels.short_side, pixels.freeze, settings.model.objects) == (
            768,
            384,
            False,
            "named",
        )


@pytest.mark.parametrize(
    ("name", "rate", "epochs", "batch", "warmup", "examples"),
    [
        ("vqa", 6.25e-7 * 256, 5, 256, 500, 658_111),
        ("vqa-paper", 1e-4, 20, 256, 2000, 443_757),
        ("vcr-answer", 7e-5 * 64, 20, 64, 1000, 212_923),
        ("vcr-rationale", 7e-5 * 64, 20, 64, 1000, 212_923),
        ("vcr-answer-paper", 5e-3, 20, 64, 1000, 212_923),
        ("vcr-rationale-paper", 5e-3, 20, 64, 1000, 212_923),
        ("refcoco", 8e-7 * 32, 20, 32, 3750, 120_191),
        ("refcoco-paper", 1e-4, 20, 256, 500, 120_191),
        ("vcr-answer-e2e", 7e-5 * 64, 20, 64, 1000, 212_923),
        ("vcr-rationale-e2e", 7e-5 * 64, 20, 64, 1000, 212_923),
        ("vcr-answer-e2e-paper", 5e-3, 20, 64, 1000, 212_923),
        ("vcr-rationale-e2e-paper", 5e-3, 20, 64, 1000, 212_923),
        ("refcoco-e2e", 8e-7 * 32, 20, 32, 3750, 120_191),
        ("refcoco-e2e-paper", 1e-4, 20, 256, 500, 120_191),
    ],
)
def test_vlberts_settings_are_those_of_its_release_and_of_its_paper(name, rate, epochs, batch, warmup, examples):
    """Spec VL-BERT §5 and §5.1: rates per sample, times the samples; SGD for VCR, which drops twice."""
    settings = load_settings(f"vlbert-{name}", [])
    optim, training = settings.optim, settings.training
    assert optim.learning_rate == pytest.approx(rate)
    assert (training.epochs, training.global_batch) == (epochs, batch)
    assert optim.warmup_ratio * examples / batch * epochs == pytest.approx(warmup, rel=2e-3)
    assert (optim.weight_decay, optim.decayed) == (1e-4, "all")
    pixels = settings.model.pixels
    assert (pixels is not None) == ("e2e" in name)
    if pixels is not None:  # the branch of the model's own pretraining
        assert (pixels.weights, pixels.short_side, pixels.long_side) == (None, 600, 1200 if "vcr" in name else 1000)
        model = settings.model
        assert (model.flip, model.swap_words) == (0.5, "refcoco" in name)
        assert (model.object_loss, model.object_masks) == ((1, "output") if "vcr" in name else (0, None))
    exclusive = name.endswith("paper") and not name.startswith("refcoco")
    assert settings.model.loss == ("softmax" if exclusive else "sigmoid")
    if name.startswith("vcr"):
        assert (optim.optimizer, optim.momentum, optim.gradient_clipping) == ("sgd", 0.9, 10)
        assert [epochs * share for share in optim.drop_at] == [14, 18]
    else:
        assert (optim.optimizer, optim.schedule, optim.gradient_clipping) == ("adamw", "linear", 1)


@pytest.mark.parametrize(("width", "size"), [(1024, "large"), (1016, "base")])
def test_an_encoder_is_large_from_1024_on(tmp_path, width, size):
    """Paper Table 4; learning rates are stated for both sizes."""
    tower = {"embed_dim": 64, "text_cfg": {"width": width, "heads": 8, "layers": 1}}
    (tmp_path / "clip.json").write_text(json.dumps(tower))
    settings = ClipSettings(weights="random", clip_weights="random")
    assert describe_subject(str(tmp_path / "clip.json"), "clip", settings)["size"] == size


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_weights_that_are_read_identify_a_model(monkeypatch, tmp_path, weights):
    """Some subjects say which files they have also where they begin with random weights."""
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    facts = SimpleNamespace(weights=[tmp_path / "model.safetensors"], hidden_size=8, encoder="small")
    subject = SimpleNamespace(describe=lambda: facts)
    monkeypatch.setattr("xdscale.finetune.command.find_subject", lambda kind: lambda *_: subject)
    found = describe_subject("small", "language", LanguageSettings(weights=weights))["weights_sha256"]
    assert found == (hashlib.sha256(b"abc").hexdigest() if weights == "pretrained" else None)


@pytest.mark.parametrize(("keep", "exports"), [(True, True), (True, False), (False, True), (False, False)])
def test_only_a_model_that_is_exported_can_be_kept(monkeypatch, keep, exports):
    facts = SimpleNamespace(weights=None, hidden_size=8, encoder="small")
    subject = SimpleNamespace(describe=lambda: facts, exports=lambda: exports)
    monkeypatch.setattr("xdscale.finetune.command.find_subject", lambda kind: lambda *_: subject)
    if keep and not exports:
        with pytest.raises(XdscaleError, match=r"^run.keep_model = true: small as mine is not exported; leave it out$"):
            describe_subject("small", "mine", LanguageSettings(), keep_model=keep)
        return
    found = describe_subject("small", "mine", LanguageSettings(), keep_model=keep)
    assert found == {"name": "small", "subject": "mine", "size": "base", "encoder": "small", "weights_sha256": None}


def test_regions_are_hashed_unless_somebody_says_otherwise():
    """With the same words as in pretraining."""
    own, other = (kind.model_fields["verify"] for kind in (RunSettings, Run))
    assert (own.default, own.description) == (other.default, other.description) == (True, own.description)
    assert load_settings("visualbert-vqa", ["run.verify=false"]).run.verify is False
