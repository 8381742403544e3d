"""VisualBERT's pretraining against transformers' own model, and through the whole engine."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, VisualBertForPreTraining, VisualBertModel

from xdscale.bench.visualbert_step import padded_inputs
from xdscale.data.visualbert import VisualBERTCollator
from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.plan.profile import build_on_meta, parameter_table, profile_model
from xdscale.pretrained.visualbert import load_visualbert, save_visualbert
from xdscale.recipe import load_recipe
from xdscale.shards.manifest import MANIFEST_NAME, Manifest
from xdscale.shards.table import Table
from xdscale.systems.contract import Slots, open_system
from xdscale.systems.visualbert import check_captions, check_inputs, invented
from xdscale.training.engine import to_device
from xdscale.training.run_folder import read_log
from xdscale.training.stored import build_module
from xdscale.training.tracing import on_meta, trace

FIXED = ["model.region_size=12", "model.dropout=0", "training.global_batch=6", "training.steps=4"]
FIXED += ["run.eval_samples=6", "run.eval_every=2", "run.checkpoint_every=2"]


def recipe(*overrides, name="quickstart-visualbert"):
    return load_recipe(name, ["model.region_size=12", "model.dropout=0", *overrides])


def built(*overrides):
    torch.manual_seed(0)
    return build_module(open_system(recipe(*overrides)), continued=False)


@pytest.fixture
def micro_batch(captioned_pictures):
    """Twelve samples of different lengths, the last one padding."""
    collate = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), recipe())
    return collate(Slots(np.zeros(12, int), np.arange(5, 65, 5), np.arange(12) < 11))


def batch_of(micro_batch):
    return to_device(micro_batch.arrays, torch.device("cpu"))


def test_losses_are_those_of_transformers(micro_batch, tmp_path):
    """Both objectives, with the heads of an export, which its model for pretraining loads as they are."""
    module = built().eval()
    with torch.no_grad():  # the heads shall not be those of the start
        for parameter in (module.match.weight, module.match.bias, module.model.pooler.weight):
            parameter.normal_(std=0.3)
    save_visualbert(module.model.config, module.state_dict(), tmp_path, alignment="sum")
    theirs, report = VisualBertForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs.eval()
    inputs, labels = padded_inputs(micro_batch.arrays), torch.from_numpy(micro_batch.arrays["match_labels"])
    terms = module(batch_of(micro_batch))
    wanted = theirs(**inputs)
    masked = wanted.prediction_logits.flatten(0, 1)
    mlm = torch.nn.functional.cross_entropy(masked, inputs["labels"].flatten(), ignore_index=-100)
    match = torch.nn.functional.cross_entropy(wanted.seq_relationship_logits, labels, ignore_index=-1)
    torch.testing.assert_close(terms["mlm"].loss_sum / micro_batch.targets["mlm"], mlm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["match"].loss_sum / micro_batch.targets["match"], match, atol=1e-5, rtol=1e-5)
    assert micro_batch.targets["match"] == 11
    assert terms["match"].metrics["accuracy"] == (wanted.seq_relationship_logits.argmax(1) == labels).sum()


@pytest.mark.parametrize(("task", "backbone"), [("vqa", 111_450_624), ("nlvr2", 110_664_192), ("vcr", 110_270_976)])
@pytest.mark.parametrize("source", ["", "-paper"])
def test_parameters_of_each_published_run(task, backbone, source):
    """Spec VisualBERT fact 1: backbone with pooler, and 624,188 of the heads."""
    counted = {row.part: row.parameters for row in parameter_table(load_recipe(f"visualbert-{task}-coco{source}"))}
    assert counted["VisualBERT of bert-base-uncased"] == backbone
    assert counted["model during training"] == backbone + 624_188
    assert counted["masked-LM head"] + counted["same-picture head"] == 624_188


def test_parameters_with_boxes():
    """Spec VisualBERT fact 1: 2,048 and six numbers of the box."""
    counted = {row.part: row.parameters for row in parameter_table(load_recipe("visualbert-flickr-coco"))}
    assert counted["VisualBERT of bert-base-uncased"] == 111_455_232


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_only_what_a_loss_reaches_is_trained():
    every = {name for name, _ in built().named_parameters()}
    poolers = {"model.pooler.weight", "model.pooler.bias"}
    assert trained(built()) == every
    assert trained(built("model.freeze_pooler=true")) == every - poolers
    assert trained(built("objectives.match=null")) == every - poolers - {"match.weight", "match.bias"}
    visual = {name for name in every if ".visual_" in name}
    assert len(visual) == 4
    assert trained(built("model.images=false")) == every - visual
    late = built("model.early_fusion=false")
    assert trained(late) - every == {name for name, _ in late.named_parameters() if name.startswith("model.fusion.")}


@pytest.mark.parametrize("more", [(), ("model.early_fusion=false",), ("model.images=false", "objectives.match=null")])
def test_every_trained_parameter_gets_a_gradient(captioned_pictures, more):
    """Also where a micro-batch has no targets at all: its losses are 0 and reach every parameter."""
    module = built(*more)
    collate = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), recipe(*more))
    for real in (True, False):
        batch = collate(Slots(np.zeros(4, int), np.arange(4), np.full(4, real)))
        module.zero_grad()
        terms = module(batch_of(batch))
        sum(term.loss_sum for term in terms.values()).backward()
        missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        norms = sum(p.grad.norm() for p in module.parameters() if p.grad is not None)
        assert (norms > 0) == real


def test_a_batch_is_the_sum_of_its_samples(captioned_pictures):
    """The gradient of a batch, of its halves and of its samples one by one, in fp64."""
    module = built().double()
    collate = VisualBERTCollator(Table(captioned_pictures, "train", "captions"), recipe())
    ids, found = np.random.default_rng(1).permutation(150)[:9], []
    for size in (9, 4, 1):
        module.zero_grad()
        for first in range(0, 9, size):
            part = ids[first : first + size]
            terms = module(batch_of(collate(Slots(np.zeros(len(part), int), part, np.ones(len(part), bool)))))
            sum(term.loss_sum for term in terms.values()).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in module.parameters()]))
    for split in found[1:]:
        assert (split - found[0]).norm() / found[0].norm() < 1e-10


def test_the_plan_runs_on_batches_like_real_ones(micro_batch):
    """Traced FLOPs of the invented batch agree with those of a real one of the same lengths, per token."""
    assert profile_model(recipe(), precision="bf16").sequence_length == 27 + 36
    longest = profile_model(recipe("model.max_regions=8"), precision="bf16")
    assert longest.sequence_length == 27 + 8
    assert longest.kept.per_sample > 0
    system, module = open_system(recipe()), build_on_meta(recipe())
    real = trace(module, micro_batch.arrays, ("mlm", "match"))
    alike = system.example(module, 12, length=int(round(micro_batch.arrays["cu_seqlens"][-1] / 12)))
    assert real.flops == pytest.approx(trace(module, alike.arrays, ("mlm", "match")).flops, rel=0.15)
    assert trace(on_meta(built()), micro_batch.arrays, ("mlm", "match")).flops == real.flops
    with pytest.raises(XdscaleError, match="sequence length 4: a sample has at least 5 tokens"):
        system.example(module, 2, length=4)


@pytest.mark.parametrize(("text", "overrides"), [(27, []), (29, []), (28, ["objectives.match=null"])])
def test_the_longest_samples_have_as_many_tokens_as_there_may_be(text, overrides):
    arrays = invented(recipe("model.max_regions=8", f"model.max_text={text}", *overrides), 3, longest=True).arrays
    assert np.diff(arrays["cu_seqlens"]).tolist() == [text + 8] * 3


@pytest.mark.parametrize(
    ("overrides", "longest", "tokens"),
    [
        # COCO's captions have 12 word pieces and its images 36 regions on average, [CLS] and [SEP] apart.
        ([], False, 1 + 2 * 13 + 36),
        (["objectives.match=null"], False, 1 + 13 + 36),
        (["model.images=false"], False, 1 + 2 * 13),
        (["model.max_text=20"], False, 20 + 36),
        # At most captions fill max_text, two of one length if there are two, and there are 100 regions.
        (["model.max_text=128"], True, 127 + 100),
        (["model.max_text=128", "objectives.match=null"], True, 128 + 100),
    ],
)
def test_samples_of_a_plan_are_as_long_as_cocos(overrides, longest, tokens):
    made = invented(recipe(*overrides), 4, longest=longest)
    assert np.diff(made.arrays["cu_seqlens"]).tolist() == [tokens] * 4
    assert made.arrays["features"].shape == (4 * (tokens - len(made.arrays["text_ids"]) // 4), 12)
    if "objectives.match=null" not in overrides:
        assert made.arrays["match_labels"].tolist() == [0, 1, 0, 1]
        assert made.targets["match"] == 4


def test_a_sample_has_a_word_in_each_caption():
    for overrides, least in (([], 5), (["objectives.match=null"], 3)):
        assert invented(recipe(*overrides), 2, least).arrays["cu_seqlens"][-1] == 2 * least
        with pytest.raises(XdscaleError, match=f"sequence length {least - 1}: a sample has at least {least} tokens"):
            invented(recipe(*overrides), 2, least - 1)


@pytest.mark.parametrize(
    ("captions", "length"),
    [(1, 3), (1, 10), (1, 14), (1, 60), (2, 5), (2, 11), (2, 27), (2, 28), (2, 61), (2, 10)],
)
def test_samples_of_a_stated_length_have_as_many_tokens(captions, length):
    """Two captions of equal lengths have an odd number of tokens; what they leave of the length are regions."""
    one = recipe(*([] if captions == 2 else ["objectives.match=null"]))
    tokens = np.diff(invented(one, 3, length).arrays["cu_seqlens"])
    assert tokens.tolist() == [length - (captions == 2 and length == 10)] * 3


def changed(folder, tmp_path, **tables):
    """A copy of a dataset whose dataset.json says something else."""
    copied = tmp_path / "changed"
    shutil.copytree(folder, copied)
    values = json.loads((copied / MANIFEST_NAME).read_text())
    for name, change in tables.items():
        change(values["tables"][name])
    (copied / MANIFEST_NAME).write_text(json.dumps(values))
    return Manifest.load(copied)


def test_what_does_not_fit_is_refused_before_weights_are_read(captioned_pictures, tmp_path):
    manifest = Manifest.load(captioned_pictures)
    check_captions(recipe(), manifest)
    cases = {
        r"region_size = 13, but the regions' features are 12 wide; write model\.region_size=12": [
            "model.region_size=13"
        ],
        r"model\.max_text = 600: package:cognition/model has 512 positions": ["model.max_text=600"],
    }
    for message, overrides in cases.items():
        with pytest.raises(XdscaleError, match=message):
            check_captions(recipe(*overrides), manifest)
    check_captions(recipe("model.region_size=13", "model.images=false"), manifest)
    with pytest.raises(XdscaleError, match="region_size = 12, but the regions have no features; take some that have"):
        check_inputs(recipe(), 0)
    check_captions(recipe("model.max_text=512"), manifest)
    lone = changed(captioned_pictures, tmp_path, captions=lambda table: table["splits"]["train"]["counts"].update(
        lone_captions=3))  # fmt: skip
    with pytest.raises(XdscaleError, match=r"some images have one alone \(3 in train\)"):
        check_captions(recipe(), lone)
    check_captions(recipe("objectives.match=null"), lone)
    text = Manifest(tables={"regions": manifest.tables["regions"]})
    with pytest.raises(XdscaleError, match="no table of captions, only regions"):
        check_captions(recipe(), text)


@pytest.mark.parametrize("name", ["text-only", "late-fusion", "random-init", "mlm-only"])
def test_ablations_of_table_6_change_one_thing(name):
    """Spec VisualBERT §6: what the rows C1 to C4 take away from the full model."""
    full, ablation = (load_recipe(f"visualbert-table6-{which}").identity() for which in ("full", name))
    model = {"text-only": {"images": False}, "late-fusion": {"early_fusion": False}, "mlm-only": {}}
    model["random-init"] = {"language": full["model"]["language"] | {"weights": "random"}}
    wanted = full | {"model": full["model"] | model[name]}
    if name == "mlm-only":
        wanted["objectives"] = full["objectives"] | {"match": None}
    assert ablation == wanted


@pytest.mark.parametrize(
    ("task", "batch", "rate", "size"),
    [("vqa", 48, 5e-5, 2048), ("nlvr2", 64, 5e-5, 1024), ("vcr", 128, 1e-4, 512), ("flickr", 32, 5e-5, 2054)],
)
def test_published_runs(task, batch, rate, size):
    """Spec VisualBERT §1 and §4; ten epochs."""
    for paper, captions in (("", 591_753), ("-paper", 566_747)):
        found = load_recipe(f"visualbert-{task}-coco{paper}")
        assert (found.training.global_batch, found.optim.learning_rate) == (batch, rate)
        assert found.region_width == size
        assert found.training.steps == captions // batch * 10
        assert found.optim.warmup_ratio == 0.1
        assert found.optim.decayed == "weights"
        assert found.optim.bias_correction == bool(paper)
        assert found.model.freeze_pooler != bool(paper)
        assert found.model.alignment == ("sum" if paper else "mean")


@pytest.fixture(scope="module")
def runs(run_by_stage, captioned_pictures, narrow_bert):
    """Run folders by ZeRO stage: stopped after 2 of 4 steps, continued on another number of ranks."""
    starts = {0: (1,), 1: (2, 1), 2: (2,), 3: (1, 2)}
    micro_batches = {0: 6, 1: 2, 2: 1, 3: 2}  # with 4 a rank would have padding
    settings = [*narrow_bert, f"data.shards={captioned_pictures}", *FIXED]
    return run_by_stage("quickstart-visualbert", settings, starts, micro_batches)


def losses(run):
    steps = [entry for entry in read_log(run / "log.jsonl") if entry["kind"] == "step"]
    return [[entry[f"loss/{name}"] for name in ("mlm", "match")] for entry in steps]


@pytest.mark.slow
def test_it_trains_alike_under_every_stage_and_goes_on_at_another_number_of_ranks(runs):
    """Of 6 samples a step: one rank with all, two with passes of 2 and 1, and runs continued from 2 on 1 and 1 on 2."""
    found = {stage: np.array(losses(run)) for stage, run in runs.items()}
    assert found[0].shape == (4, 2)
    for stage in (1, 2, 3):
        np.testing.assert_allclose(found[stage], found[0], rtol=1e-4)
    assert found[0][-1, 0] < found[0][0, 0]


@pytest.mark.slow
def test_an_export_is_read_by_transformers_and_begun_with(runs, narrow_bert, tmp_path):
    out = tmp_path / "export"
    said = export_run(runs[2], out)
    assert re.search(r"VisualBERT \([\d,]+ parameters\), with the heads of mlm, match", said)
    theirs, report = VisualBertModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert theirs.config.visual_embedding_dim == 12
    assert theirs.config.features_of == {"model": "drawn", "sha256": None}
    assert AutoTokenizer.from_pretrained(out)("a dog")["input_ids"][0] == 101
    ours, heads = load_visualbert(out)
    assert sorted(heads) == sorted(name for name in heads if name.startswith(("mlm.", "match.")))
    for place in (out, runs[2]):
        begun = built(*narrow_bert, f"model.start={place}")
        for name, value in ours.state_dict().items():
            assert torch.equal(begun.model.state_dict()[name], value), name
        for name, value in heads.items():
            assert torch.equal(begun.state_dict()[name], value), name
    with pytest.raises(XdscaleError, match=r"start = .*: holds no fitting weights for model\.embeddings\.visual_proj"):
        built(*narrow_bert, f"model.start={out}", "model.spatial=true")
