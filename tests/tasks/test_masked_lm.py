"""The fair baseline: the encoder alone with masked-LM, against transformers' own masked-LM model."""

import pytest
import torch
from transformers import AutoModel, BertForMaskedLM

from xdscale.errors import XdscaleError
from xdscale.plan.profile import parameter_table
from xdscale.recipe import load_recipe
from xdscale.systems.mlm import build_masked_lm


@pytest.fixture(scope="module")
def module(cassette_model):
    return build_masked_lm(load_recipe("quickstart-mlm", [f"model.language.name={cassette_model}"])).eval()


def test_the_loss_is_transformers_own(module, cassette_model, batch):
    reference = BertForMaskedLM.from_pretrained(cassette_model, attn_implementation="eager").eval()
    labels = torch.full(batch["language_ids"].shape, -100)
    labels.view(-1)[batch["masked_lm_positions"]] = batch["masked_lm_labels"]
    with torch.no_grad():
        loss, metrics = module(batch)["mlm"]
        wanted = reference(input_ids=batch["language_ids"], labels=labels)
    torch.testing.assert_close(loss / len(batch["masked_lm_labels"]), wanted.loss, atol=1e-4, rtol=1e-5)
    assert metrics["accuracy"] == (wanted.logits.argmax(-1) == labels).sum()


def test_recomputed_layers_keep_less_and_give_the_same(cassette_model, batch, kept_bytes):
    results, bytes_kept = [], []
    for recomputed in (False, True):
        torch.manual_seed(0)
        stated = [f"model.language.name={cassette_model}", "model.dropout=0"]
        module = build_masked_lm(load_recipe("quickstart-mlm", stated)).train()
        if recomputed:
            module.enable_activation_checkpointing()
        bytes_kept.append(kept_bytes(module, batch))
        loss = module(batch)["mlm"][0]
        loss.backward()
        weight = module.model["language"].get_input_embeddings().weight
        results.append((loss.item(), weight.grad.clone()))
    assert bytes_kept[1] < bytes_kept[0]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-4)


def test_it_is_the_language_encoder_and_nothing_of_clip(module, cassette_model):
    names = {name.split(".")[0] for name, _ in module.named_parameters()}
    assert names == {"model", "mlm"}
    encoder = AutoModel.from_pretrained(cassette_model)
    assert {name.removeprefix("model.language.") for name in module.state_dict() if name.startswith("model.")} == set(
        encoder.state_dict()
    )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-base-mlm-wikitext103", 109_482_240),
        ("electra-large-mlm-wikitext103", 334_092_288),
        ("bert-large-mlm-wikitext103", 335_141_888),
    ],
)
def test_parameters_are_those_of_table_6(name, parameters):
    assert parameter_table(load_recipe(name))[0].parameters == parameters


@pytest.mark.parametrize("size", ["bert-base", "electra-base", "electra-large"])
def test_the_baseline_differs_from_its_subject_by_clip_alone(size):
    baseline = load_recipe(f"{size}-mlm-wikitext103")
    subject = load_recipe("xd" + size + "-wikitext103")
    without = subject.identity() | {"system": "mlm"}
    del without["model"]["clip"], without["model"]["cross_layers"]
    del without["objectives"]["match"], without["objectives"]["clip_tokens"]
    assert baseline.identity() == without
    assert (baseline.data, baseline.run) == (subject.data, subject.run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.cross_layers=2", r"unknown key 'model\.cross_layers'"),
        ("objectives.match={}", r"unknown key 'objectives\.match'; known keys: mlm"),
        ("objectives.mlm=null", r"objectives\.mlm = None"),
    ],
)
def test_what_needs_clip_is_refused_without_it(override, message):
    with pytest.raises(XdscaleError, match=message):
        load_recipe("quickstart-mlm", [override])


def test_it_trains_and_exports_as_any_other(adapt, wiki_shards, cassette_model, tmp_path):
    from xdscale.export import export_run

    config = tmp_path / "ds.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}')
    overrides = ("training.steps=2", "training.global_batch=4", "run.eval_samples=4")
    launch = adapt(
        *("quickstart-mlm", f"data.shards={wiki_shards}", f"output.folder={tmp_path / 'run'}", *overrides),
        *("--deepspeed_config", str(config)),
    )
    assert launch.code == 0, launch.stderr[-3000:]
    assert "full model" not in export_run(tmp_path / "run", tmp_path / "export")
    assert not (tmp_path / "export" / "cross_modal").exists()
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (cassette_model, tmp_path / "export"))
    changed = {name for name in before if "pooler" not in name and not torch.equal(before[name], after[name])}
    assert any("encoder.layer.1" in name for name in changed)
