"""What is given wrongly, and what cannot be read: one message each that names it, from the function that reads it."""

import errno
import os
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from xdscale import ds_config, errors, version
from xdscale.analysis import comparison
from xdscale.ds_sections import check_sections
from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.extraction import pictures
from xdscale.extraction.backbone import _torchvision
from xdscale.names import resolve_path
from xdscale.pretrained.language import language_config
from xdscale.pretrained.visualbert import config_from_bert, load_visualbert
from xdscale.pretrained.vlbert import load_vlbert
from xdscale.recipe import load_recipe
from xdscale.recipes.mlm.schema import Language
from xdscale.systems.contract import Objective, System, Term
from xdscale.systems.xdbert import build_adapted
from xdscale.tasks import flickr30k_entities, refcoco
from xdscale.training.stored import run_recipe
from xdscale.training.sums import weighted_loss
from xdscale.weights import read_state_dict


def read_text(read, name, text):
    """Returns what reads a file of this name and content."""

    def act(folder):
        (folder / name).write_text(text)
        return read(folder / name)

    return act


def of_another_system(folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("quickstart-mlm").model_dump(mode="json")))
    build_adapted(folder)


def damaged_run(folder):
    (folder / "recipe.yaml").write_text("a: [")
    run_recipe(folder)


def no_state_dict(folder):
    torch.save([1, 2], folder / "a.pt")
    read_state_dict(folder / "a.pt")


def export_below_a_file(folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(load_recipe("quickstart").model_dump(mode="json")))
    export_run(folder, "a" * 5000)


def loss_of(*carried):
    terms = {name: Term.scored(torch.tensor(1.0), torch.tensor(1)) for name in ("a", "b")}
    weighted_loss(terms, {name: Objective(1.0) for name in "abc"}, dict.fromkeys("abc", 1), carried)


BERT = SimpleNamespace(model_type="bert", type_vocab_size=1)
JSONL = '{"id": 1, "sentence1": 2, "correct_baseline": 0, "correct_ours": 0}\n'
CSV = 'id,sentence1,correct_baseline,correct_ours\n1,"a" b,0,0\n'


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda _: resolve_path("a" * 5000), "a{60,}.*: cannot be read: File name too long"),
        (lambda _: resolve_path("package:no_such_one/x"), "package:no_such_one/x: the package 'no_such_one' is not in"),
        (lambda _: resolve_path("package:json/no"), "package:json/no: .*/json/no does not exist in the installed pack"),
        (lambda _: resolve_path("package:json.tool/x"), "'json.tool' is not the name of a package; expected package:N"),
        (damaged_run, "{folder}/recipe.yaml: not YAML: "),
        (of_another_system, "{folder}: was trained as 'mlm': there is no cross-modal model in it$"),
        (no_state_dict, "{folder}/a.pt: expected a state dict, found list$"),
        (export_below_a_file, "a{5000}: cannot be written: File name too long$"),
        (
            read_text(lambda path: ds_config.read_ds_config(str(path)), "a.json", "[]"),
            "a.json: expected a JSON obj.*list$",
        ),
        (read_text(comparison.read_comparison, "a.csv", CSV), "{folder}/a.csv, line 2: not CSV "),
        (
            read_text(comparison.read_comparison, "a.csv", CSV[3:]),
            "a.csv, line 1: the header lacks id; it has sentence1,",
        ),
        (read_text(comparison.read_comparison, "a.csv", f'"x" y{CSV}'), "{folder}/a.csv, line 1: not CSV "),
        (read_text(comparison.read_comparison, "a.jsonl", JSONL), "a.jsonl, line 1: sentence1 and sentence2 must be t"),
        (refcoco._read_references, "{folder}: cannot be read: Is a directory$"),
        (flickr30k_entities._parse, "{folder}: cannot be read: Is a directory$"),
        (lambda _: pictures.find_pictures([], "stem"), "no images: name at least one file or folder$"),
        (
            read_text(lambda path: language_config(Language(name=str(path))), "bert", ""),
            "{folder}/bert: expected a folder with config.json and the weights$",
        ),
        (lambda folder: load_visualbert(folder / "no"), "{folder}/no: no such folder or file; expected a VisualBERT$"),
        (lambda folder: load_vlbert(folder / "no"), "{folder}/no: no such folder or file; expected a VL-BERT$"),
        (lambda _: config_from_bert(BERT, region_size=8), "model.language: .* by segments: it needs 2, not 1$"),
        (lambda _: _torchvision("vit_b_16", "random", None), "torchvision:vit_b_16: say with --stage which of its nod"),
        (lambda _: loss_of("a"), "a micro-batch whose targets name a made the module give terms of a and b; the two m"),
        (lambda _: loss_of("a", "b", "c"), "targets name a and b and c made the module give terms of a and b; "),
        (lambda _: loss_of(), "targets name no objective made the module give terms of a and b; "),
    ],
)
def test_one_message_names_it(tmp_path, act, message):
    with pytest.raises(XdscaleError) as error:
        act(tmp_path)
    assert re.search(message.replace("{folder}", re.escape(str(tmp_path))), str(error.value)), str(error.value)


def test_sections_of_a_deepspeed_file_are_objects():
    for section in ("bf16", "fp16", "activation_checkpointing", "zero_optimization", "optimizer"):
        with pytest.raises(XdscaleError, match=rf"^f: {section} = 'on': expected a JSON object$"):
            check_sections("f", {section: "on"})


def test_what_a_system_does_not_do_is_told():
    class Bare(System):
        open = build = parts = None

    bare = Bare(SimpleNamespace(system="mine"))
    with pytest.raises(XdscaleError, match="^a run of 'mine' cannot be planned: its system invents no samples$"):
        bare.example(None, 2)
    with pytest.raises(XdscaleError, match="^runs/a: a run of 'mine' has nothing to export$"):
        bare.export({}, "runs/a", None)
    assert bare.finish(None, None) == 0
    assert bare.published_state(None) is None
    assert bare.keep(None) is None


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full (No space left on device)"),
        (errno.EDQUOT, "the disk quota is used up (Disk quota exceeded)"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_why_a_file_was_refused(number, reason):
    assert errors.refusal(OSError(number, os.strerror(number))) == reason
    assert errors.refusal(OSError(number, os.strerror(number), "a/b")) == f"a/b: {reason}"
    assert errors.refusal(OSError("no number")) == "no number"


def test_the_room_on_a_disk_is_told_where_it_can_be(monkeypatch, tmp_path):
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda place: SimpleNamespace(free=1536 * 2**20 + 1))
    assert errors.free_mib(tmp_path / "new" / "folder") == "1,536 MiB"

    def refuse(place):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(errors.shutil, "disk_usage", refuse)
    assert errors.free_mib(tmp_path) == "an unknown number of MiB"


def test_without_git_no_commit_is_told(monkeypatch):
    monkeypatch.setattr(version.shutil, "which", lambda name: None)
    assert version.commit() == ""
