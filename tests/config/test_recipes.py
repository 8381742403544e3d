"""Recipes: what ships, what is refused, what an override does."""

import re

import pytest
from pydantic import ValidationError

from xdscale.errors import XdscaleError
from xdscale.finetune.recipe import load_settings
from xdscale.recipe import load_recipe, shipped_recipes

from .conftest import MINIMAL


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_says_what_it_is(path):
    recipe = load_recipe(path.stem)
    assert recipe.output.folder == f"runs/{path.stem}"
    assert recipe.system.removesuffix("_task") == path.parent.name  # a second phase stands beside the first
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("encoder", ["xdbert-base", "xdelectra-base", "xdelectra-large"])
@pytest.mark.parametrize("corpus", ["wikitext103", "wikipedia"])
def test_published_recipes_hold_the_papers_numbers(encoder, corpus):
    """Paper appendix C.1: learning rate 1e-4, warm-up .05, 1 epoch of the 20 that take 16k steps; §2.1: 2 layers."""
    recipe = load_recipe(f"{encoder}-{corpus}")
    assert recipe.optim.learning_rate == 1e-4
    assert recipe.optim.warmup_ratio == 0.05
    assert recipe.training.steps == 16_000 / 20
    assert recipe.model.cross_layers == 2
    assert recipe.objectives.weights() == {"mlm": 1.0, "match": 1.0, "clip_tokens": 1.0}
    assert (recipe.objectives.mlm.select, recipe.objectives.mlm.mask, recipe.objectives.mlm.random) == (0.15, 0.8, 0.1)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("xdbert-base-mlm-match", "objectives", {"clip_tokens": None}),
        ("xdbert-base-mlm", "objectives", {"clip_tokens": None, "match": None}),
        ("xdbert-base-one-cross-layer", "model", {"cross_layers": 1}),
        ("xdbert-base-2-epochs", "training", {"steps": 1600}),
        ("xdbert-base-20-epochs", "training", {"steps": 16_000}),
    ],
)
def test_table_3_ablations_change_one_thing(name, key, value):
    """Spec xdbert §6, Table 3."""
    main, ablation = load_recipe("xdbert-base-wikitext103").identity(), load_recipe(name).identity()
    assert ablation == main | {key: main[key] | value}


def test_unknown_key_names_the_nearest_right_one(write):
    path = write(MINIMAL | {"training": {"steps": 10, "global_batch": 4, "sed": 1}})
    with pytest.raises(XdscaleError, match=r"recipe\.yaml: unknown key 'training\.sed'; did you mean 'seed'\?"):
        load_recipe(path)


@pytest.mark.parametrize("value", ["false", "true", "off", "0", "no", "[]"])
@pytest.mark.parametrize("system", ["quickstart", "quickstart-visualbert", "quickstart-vlbert"])
def test_an_objective_that_is_turned_off_in_another_way_than_by_null_is_told_how(system, value):
    with pytest.raises(XdscaleError, match=r"^the command line: objectives\.mlm = .*: expected null, which turns"):
        load_recipe(system, [f"objectives.mlm={value}"])
    assert "mlm" not in load_recipe(system, ["objectives.mlm=null"]).objectives.weights()


def test_the_only_objective_is_not_said_to_turn_off():
    for value in ("false", "null"):
        with pytest.raises(XdscaleError, match=r"objectives\.mlm = \w+: expected its keys, such as \{weight: 1\.0\}"):
            load_recipe("quickstart-mlm", [f"objectives.mlm={value}"])
    assert load_recipe("quickstart-mlm", ["objectives.mlm={}"]).objectives.weights() == {"mlm": 1.0}


def test_unknown_section_names_the_nearest_right_one(write):
    with pytest.raises(XdscaleError, match=r"unknown key 'trainin'; did you mean 'training'\?"):
        load_recipe(write(MINIMAL | {"trainin": {}}))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("training.eval_every", "run.eval_every"),
        ("data.cache", "run.cache"),
        ("model.language.dropout", "model.dropout"),
        ("steps", "training.steps"),
    ],
)
def test_a_key_of_another_section_is_told_where_it_belongs(write, wrong, right):
    message = re.escape(f"unknown key '{wrong}'; did you mean '{right}'?")
    with pytest.raises(XdscaleError, match=message):
        load_recipe(write(MINIMAL), [f"{wrong}=5"])
    if wrong.startswith("training"):
        with pytest.raises(XdscaleError, match=f"recipe.yaml: {message}"):
            load_recipe(write(MINIMAL | {"training": MINIMAL["training"] | {"eval_every": 5}}))


def test_key_inside_an_optional_section_is_checked(write):
    with pytest.raises(XdscaleError, match=r"unknown key 'objectives\.mlm\.wieght'; did you mean 'weight'\?"):
        load_recipe(write(MINIMAL | {"objectives": {"mlm": {"wieght": 2}}}))


def test_missing_key_is_named(write):
    with pytest.raises(XdscaleError, match=r"'training\.steps' is missing"):
        load_recipe(write(MINIMAL | {"training": {"global_batch": 4}}))


def test_wrong_type_shows_key_and_value(write):
    with pytest.raises(XdscaleError, match=r"training\.steps = 'many'"):
        load_recipe(write(MINIMAL | {"training": {"steps": "many", "global_batch": 4}}))


@pytest.mark.parametrize("side", ["short_side", "long_side"])
def test_an_image_is_never_scaled_to_what_no_memory_holds(side):
    for name, load in (("vlbert-base-e2e", load_recipe), ("vlbert-refcoco-e2e", load_settings)):
        for wrong in (15, 10_001, 10**20):
            with pytest.raises(XdscaleError, match=rf"model\.pixels\.{side} = {wrong}: Input should be"):
                load(name, [f"model.pixels.{side}={wrong}"])


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("vlbert-base-precomputed", ("region_size", "region_classes", "max_elements")),
        ("visualbert-vqa-coco", ("region_size", "max_regions", "max_text")),
    ],
)
def test_sizes_of_which_no_array_can_be_made_are_refused(name, keys):
    for key in keys:
        for wrong in (0, 2**20, 10**20):
            with pytest.raises(XdscaleError, match=rf"model\.{key} = {wrong}: Input should be"):
                load_recipe(name, [f"model.{key}={wrong}"])


@pytest.mark.parametrize(
    "value",
    [
        *(f"optim.{key}=.inf" for key in ("learning_rate", "eps", "weight_decay", "gradient_clipping")),
        "objectives.mlm.weight=.inf",
        *(f"optim.rate_factors={{heads: {value}}}" for value in (".inf", "true", "-1", ".nan")),
        *(f"optim.betas=[{value}, 0.9]" for value in ("1", "-0.1", ".nan", "true")),
        "optim.betas=[0.9, 1.0]",
    ],
)
def test_no_rate_weight_or_beta_is_infinite_or_a_switch(write, value):
    key = value.partition("=")[0]
    with pytest.raises(XdscaleError, match=rf"^the command line: {re.escape(key)}[^ ]* = [^ ]*: Input should be "):
        load_recipe(write(MINIMAL), [value])


def test_the_system_decides_which_keys_there_are(write):
    message = (
        "recipe.yaml: 'system' is missing; it is one of finetune, mlm, visualbert, visualbert_task, vlbert, "
        "xdbert; only recipes of "
    )
    with pytest.raises(XdscaleError, match=message):
        load_recipe(write({key: value for key, value in MINIMAL.items() if key != "system"}))
    for wrong, hint in (
        ("xdbret", "did you mean 'xdbert'"),
        (7, "there are finetune, mlm, visualbert, visualbert_task, vlbert, xdbert"),
    ):
        with pytest.raises(XdscaleError, match=rf"recipe\.yaml: system = .*: no such system; {hint}"):
            load_recipe(write(MINIMAL | {"system": wrong}))
    with pytest.raises(XdscaleError, match=r"unknown key 'model\.clip'"):
        load_recipe(write(MINIMAL), ["system=mlm"])


def test_a_name_that_no_file_can_have_is_no_recipe():
    with pytest.raises(XdscaleError, match="no such recipe"):
        load_recipe("a" * 5000)


def test_a_folder_is_no_recipe_but_may_be_that_of_a_run(tmp_path):
    with pytest.raises(XdscaleError, match="ships; it is a folder$"):
        load_recipe(str(tmp_path))
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(XdscaleError, match=rf"ships; it is a folder; of a run give {tmp_path}/recipe\.yaml$"):
        load_recipe(str(tmp_path))


def test_a_recipe_of_finetuning_is_told_from_one_that_does_not_exist():
    with pytest.raises(XdscaleError, match="^vlbert-vqa: no such recipe; .* one of 'xdscale finetune --recipe'"):
        load_recipe("vlbert-vqa")


def test_unknown_recipe_name_suggests_one():
    with pytest.raises(XdscaleError, match="did you mean 'quickstart'"):
        load_recipe("quikstart")


def test_no_objective_is_refused(write):
    with pytest.raises(
        XdscaleError, match="objectives: every one is off; keep at least one of mlm, match, clip_tokens"
    ):
        load_recipe(write(MINIMAL | {"objectives": {"mlm": None, "match": None, "clip_tokens": None}}))


def test_mlm_rates_beyond_one_are_refused(write):
    with pytest.raises(XdscaleError, match="is more than 1"):
        load_recipe(write(MINIMAL | {"objectives": {"mlm": {"mask": 0.9, "random": 0.2}}}))


def test_override_without_equals_sign_is_refused(write):
    with pytest.raises(XdscaleError, match=r"has the form section\.key=value"):
        load_recipe(write(MINIMAL), ["training.seed"])


@pytest.mark.parametrize(("load", "figure"), [(load_recipe, "loss/mlm"), (load_settings, "loss/task")])
def test_patience_needs_a_figure_to_watch(load, figure):
    """Said where the recipe is read: not by ranks, after a wait in a queue."""
    message = "the command line: training.patience = 3: training.best must name the figure to watch"
    with pytest.raises(XdscaleError, match=message):
        load("quickstart", ["training.patience=3"])
    with pytest.raises(XdscaleError, match="training.patience = 0: Input should be greater than or equal to 1"):
        load("quickstart", [f"training.best={figure}", "training.patience=0"])
    assert load("quickstart", [f"training.best={figure}", "training.patience=3"]).training.patience == 3


def test_what_was_typed_wrongly_is_not_blamed_on_the_file(write):
    for typed, problem in (
        ("trainig.steps=3", "unknown key 'trainig'; did you mean 'training'"),
        ("training.step=3", "unknown key 'training.step'; did you mean 'steps'"),
        ("int=3", "unknown key 'int'"),
        ("training.float=1", "unknown key 'training.float'"),
        ("training.steps=many", "training.steps = 'many'"),
        ("training={}", "'training.steps' is missing"),
    ):
        with pytest.raises(XdscaleError, match=f"^the command line: {re.escape(problem)}"):
            load_recipe(write(MINIMAL), [typed])
    with pytest.raises(XdscaleError, match=r"recipe\.yaml: training\.steps = 'many'"):
        load_recipe(write(MINIMAL | {"training": {"steps": "many", "global_batch": 4}}), ["training.seed=3"])


def test_identity_ignores_where_and_how_often_but_not_what():
    recipe = load_recipe("quickstart")
    moved = load_recipe("quickstart", ["output.folder=elsewhere", "run.eval_every=7", "run.stop_at_step=3"])
    other = load_recipe("quickstart", ["training.seed=1"])
    assert moved.identity() == recipe.identity() != other.identity()


@pytest.mark.parametrize(("name", "size", "layers"), [("quickstart", 128, 2), ("quickstart-minilm", 384, 6)])
def test_quickstart_recipes_build_on_real_pretrained_encoders(name, size, layers):
    """Weights and vocabulary ship in registry packages; their SHA-256 stands in the recipe."""
    from xdscale.pretrained.language import load_language_encoder

    recipe = load_recipe(name)
    assert len(recipe.model.language.sha256) == 64
    encoder = load_language_encoder(recipe.model.language, dropout=0.1)
    assert (encoder.config.hidden_size, encoder.config.num_hidden_layers) == (size, layers)
    # Pretrained, not random: BERT's initialiser gives every matrix the standard deviation 0.02.
    assert abs(encoder.get_input_embeddings().weight.std().item() - 0.02) > 0.005


COUNTS = ["eval_every", "eval_samples", "checkpoint_every", "keep_checkpoints", "keep_every", "stop_at_step"]


COUNTS += ["max_skipped_in_row", "hang_seconds"]


@pytest.mark.parametrize("key", ["training.steps", "training.global_batch", *(f"run.{count}" for count in COUNTS)])
def test_a_count_is_1_or_more(write, key):
    few = ["run.checkpoint_every=1"] if key == "run.keep_every" else []
    section, name = key.split(".")
    assert getattr(getattr(load_recipe(write(MINIMAL), [*few, f"{key}=1"]), section), name) == 1
    with pytest.raises(XdscaleError, match=f"{key} = 0"):
        load_recipe(write(MINIMAL), [f"{key}=0"])


@pytest.mark.parametrize("key", ["training.steps", "training.global_batch", "model.cross_layers"])
def test_a_count_that_no_run_has_is_refused(write, key):
    for value in (2**31, "9" * 400):
        with pytest.raises(XdscaleError, match=rf"{key} = {value}: .*less than"):
            load_recipe(write(MINIMAL), [f"{key}={value}"])


def test_steps_that_are_kept_for_good_must_be_steps_that_are_saved(write):
    how = ["run.checkpoint_every=20"]
    assert load_recipe(write(MINIMAL), [*how, "run.keep_every=40"]).run.keep_every == 40
    for every in (10, 30):
        with pytest.raises(XdscaleError, match="must be a multiple of run.checkpoint_every"):
            load_recipe(write(MINIMAL), [*how, f"run.keep_every={every}"])


COMMANDS = ["pipe:cat /wiki", "pipe:touch x; cat s3://bucket/wiki"]
ELSEWHERE = [
    *("ssh://host/wiki", "sftp://host/wiki", "github://o:r@main/wiki", "ais://b/wiki", "local:///wiki", "S3://b/wiki"),
    *("simplecache::https://host/wiki", "filecache::file:///wiki", "zip://wiki::s3://b/x.zip", "reference://::x"),
    *("s3://b/wiki::pipe:cat", "PIPE:cat x://y", " pipe:cat x://y", "https+pipe://x"),
]
READ = ["s3://bucket/wiki", "https://host/wiki", "gs://b/wiki", "hf://datasets/o/r", "file:///wiki", "memory://wiki"]


@pytest.mark.parametrize("url", COMMANDS + ELSEWHERE)
def test_a_file_may_not_name_a_url_that_does_more_than_read(write, url):
    path = write(MINIMAL | {"data": {"shards": url}, "run": {"cache": "/cache"}})
    with pytest.raises(XdscaleError, match=r"recipe\.yaml: data\.shards = .* followed only when typed"):
        load_recipe(path, ["training.seed=1"])
    # A person may, on the command line, whatever the file says.
    for typed in ([f"data.shards={url}"], [f"data={{shards: '{url}'}}"]):
        assert load_recipe(path, typed).data.shards == url.strip() or url.startswith(" ")
    assert load_recipe(path, ["data.shards=/wiki", "run.cache=null"]).data.shards == "/wiki"


@pytest.mark.parametrize("url", READ)
def test_a_file_may_name_a_url_that_is_read(write, url):
    assert load_recipe(write(MINIMAL | {"data": {"shards": url}, "run": {"cache": "/cache"}})).data.shards == url


def test_values_are_never_changed_after_loading():
    recipe, settings = load_recipe("quickstart"), load_settings("paper", [])
    for section, key in ((recipe, "training"), (recipe.training, "steps"), (recipe.model.language, "name")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))
    with pytest.raises(ValidationError, match="frozen"):
        settings.training.epochs = 1


def test_a_number_that_is_meant_as_a_text_belongs_in_quotes(write):
    with pytest.raises(XdscaleError, match=r"model\.language\.name = 7: .*; write a number that is meant as a text in"):
        load_recipe(write(MINIMAL), ["model.language.name=7"])
    with pytest.raises(XdscaleError, match="steps = 'many'") as error:
        load_recipe(write(MINIMAL), ["training.steps=many"])
    assert "quotes" not in str(error.value)


def test_what_does_not_go_together_is_told_where_it_was_said(tmp_path):
    """On the command line, and not in the shipped file, which is in order."""
    own = tmp_path / "own.yaml"
    own.write_text(load_recipe("quickstart").to_yaml().replace("best: null", "best: loss/nothing"))
    for name, overrides, where in (
        ("quickstart", ["training.best=loss/nothing"], "the command line"),
        (str(own), [], str(own)),
        (str(own), ["training.steps=9"], str(own)),
    ):
        with pytest.raises(XdscaleError, match=rf"^{where}: training\.best = loss/nothing: no figure of an objective"):
            load_recipe(name, overrides)
    with pytest.raises(XdscaleError, match=r"quickstart\.yaml: objectives: every one is off"):
        load_recipe("quickstart", [f"objectives.{name}=null" for name in ("mlm", "match", "clip_tokens")])
    with pytest.raises(XdscaleError, match=r"^the command line: objectives\.mlm: mask 0\.9 \+ random 0\.9 is"):
        load_recipe("quickstart", ["objectives.mlm.mask=0.9", "objectives.mlm.random=0.9"])
