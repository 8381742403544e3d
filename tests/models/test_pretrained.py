import hashlib
import io
import json
import os
import pickle
import re
import shutil
import zipfile

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xdscale.errors import XdscaleError
from xdscale.kernels.quick_gelu import quick_gelu
from xdscale.pretrained.clip import clip_config, load_clip_text_tower
from xdscale.pretrained.language import KNOWN, language_config, load_language_encoder, tokenizer_folder
from xdscale.recipes.mlm.schema import Language
from xdscale.recipes.xdbert.schema import Clip

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 2}


def language(name, weights="pretrained", sha256=None):
    return Language(name=str(name), weights=weights, sha256=sha256)


@pytest.fixture
def folder(cassette_model, tmp_path):
    """A copy of the real BERT, to be spoilt."""
    return shutil.copytree(cassette_model, tmp_path / "model")


@pytest.fixture
def clip_file(tmp_path):
    """A whole (small) CLIP with its vision tower, and a function that stores a state dict of it."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32}
    clip = open_clip.CLIP(24, vision, TEXT, quick_gelu=True)
    config = tmp_path / "clip.json"
    config.write_text(json.dumps({"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT}))

    def store(state, name="clip.safetensors"):
        path = tmp_path / name
        state = {key: value.contiguous() for key, value in state.items()}
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        return Clip(name=str(config), weights=str(path))

    return clip, store


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert-base-uncased", (30522, 768, 12, 12, 3072, 512, 2, 1e-12, "gelu")),
        ("bert-large-uncased", (30522, 1024, 24, 16, 4096, 512, 2, 1e-12, "gelu")),
        ("google/electra-base-discriminator", (30522, 768, 12, 12, 3072, 512, 2, 1e-12, "gelu")),
        ("google/electra-large-discriminator", (30522, 1024, 24, 16, 4096, 512, 2, 1e-12, "gelu")),
    ],
)
def test_known_architectures(name, expected):
    """Spec xdbert §2.1, without a network."""
    config = language_config(language(name))
    assert (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.intermediate_size,
        config.max_position_embeddings,
        config.type_vocab_size,
        config.layer_norm_eps,
        config.hidden_act,
    ) == expected
    assert getattr(config, "embedding_size", config.hidden_size) == config.hidden_size
    assert tokenizer_folder(language(name, "random")) is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-base-uncased", 109_482_240),
        ("bert-large-uncased", 335_141_888),
        ("google/electra-base-discriminator", 108_891_648),
        ("google/electra-large-discriminator", 334_092_288),
    ],
)
def test_language_model_counts(name, parameters):
    """Spec xdbert §10 fact 1 and the caveat of §2.5: BERT with its pooler, ELECTRA without one."""
    with torch.device("meta"):
        model = load_language_encoder(language(name, "random"), dropout=0.1)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_weights_are_those_of_the_file(cassette_model):
    """The file says LayerNorm.gamma and beta, as old checkpoints do; nothing may stay at its first value."""
    stored = load_file(cassette_model / "model.safetensors")
    model = load_language_encoder(language("package:cognition/model"), dropout=0.1)
    found = model.state_dict()
    names = [name for name in found if not name.startswith("pooler.")]
    assert len(names) == 37
    for name in names:
        old = "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        assert torch.equal(found[name], stored[old]), name


def test_dropout_of_the_recipe_replaces_the_models(cassette_model):
    model = load_language_encoder(language(cassette_model), dropout=0.25)
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    assert len(rates) == 7
    assert set(rates.values()) == {0.25}
    assert language_config(language(cassette_model)).hidden_dropout_prob == 0.1


def test_random_weights_ignore_the_file(cassette_model):
    torch.manual_seed(0)
    first = load_language_encoder(language(cassette_model, "random"), dropout=0.1).embeddings.word_embeddings.weight
    stored = load_file(cassette_model / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert (first - stored).abs().mean() > 1e-3


def test_fp16_files_become_fp32(folder):
    state = load_file(folder / "model.safetensors")
    save_file({name: value.half() for name, value in state.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    model = load_language_encoder(language(folder), dropout=0.1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = state["bert.embeddings.word_embeddings.weight"].half().float()
    assert torch.equal(model.embeddings.word_embeddings.weight, expected)


def test_torch_files_are_read_as_tensors_only(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    model = load_language_encoder(language(folder), dropout=0.1)
    expected = state["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(model.embeddings.word_embeddings.weight, expected)


def test_code_in_a_torch_file_does_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    victim = tmp_path / "ran"
    spoil(folder / "pytorch_model.bin", victim)
    with pytest.raises(XdscaleError, match=r"pytorch_model\.bin: cannot be loaded: .*other things than tensors"):
        load_language_encoder(language(folder), dropout=0.1)
    assert not victim.exists()


def spoil(path, victim):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(victim),)

    torch.save({"weight": Runs()}, path, pickle_module=pickle)


def test_sha256_is_checked_before_loading(folder):
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    load_language_encoder(language(folder, sha256=right), dropout=0.1)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"\x01")
    with pytest.raises(XdscaleError, match=rf"model\.safetensors: SHA-256 is [0-9a-f]{{64}}.*says {right}"):
        load_language_encoder(language(folder, sha256=right), dropout=0.1)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(XdscaleError, match=r"holds neither model\.safetensors nor pytorch_model\.bin.*random"):
        load_language_encoder(language(folder), dropout=0.1)
    load_language_encoder(language(folder, "random"), dropout=0.1)


def test_a_torn_weights_file(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(XdscaleError, match=r"model\.safetensors: cannot be loaded"):
        load_language_encoder(language(folder), dropout=0.1)


def test_weights_of_another_encoder(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "intermediate_size": 500}))
    with pytest.raises(XdscaleError, match=r"missing encoder\.layer\.2\..* and \d+ more; of another shape encoder"):
        load_language_encoder(language(folder), dropout=0.1)


def test_weights_that_are_no_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("encoder.layer.1.output.dense.weight"))
    spoilt = torch.full_like(weights[name], torch.nan), torch.ones_like(weights[name], dtype=torch.int8)
    for value, message in zip(spoilt, ("not all values are finite", "int8, expected floating point; quantised")):
        save_file(weights | {name: value}, folder / "model.safetensors", {"format": "pt"})
        whole = rf"model\.safetensors: encoder\.layer\.1\.output\.dense\.weight: {message}"
        with pytest.raises(XdscaleError, match=whole):
            load_language_encoder(language(folder), dropout=0.1)


def test_config_of_another_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(XdscaleError, match=r"config\.json: model_type is 'gpt2'; supported are 'bert', 'electra'"):
        language_config(language(folder))


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_spoilt_config(folder, text):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(XdscaleError, match=re.escape(str(folder / "config.json"))):
        load_language_encoder(language(folder), dropout=0.1)


def test_hub_names_without_a_network():
    told = r"^nobody/no-such-bert: no such .*in a recipe as model\.language\.name.*local folder.*bert-base-unc.*random"
    with pytest.raises(XdscaleError, match=told):
        language_config(language("nobody/no-such-bert"))
    with pytest.raises(XdscaleError, match=r"^bert-base-uncased: .*local folder.*weights: random"):
        load_language_encoder(language("bert-base-uncased"), dropout=0.1)


def test_a_folder_goes_before_the_table(folder, monkeypatch):
    shutil.move(folder, folder.parent / "bert-base-uncased")
    monkeypatch.chdir(folder.parent)
    assert "bert-base-uncased" in KNOWN
    assert language_config(language("bert-base-uncased")).hidden_size == 128
    assert load_language_encoder(language("bert-base-uncased"), dropout=0.1).config.num_hidden_layers == 2


def test_tokenizer_folder(cassette_model, folder):
    assert tokenizer_folder(language("package:cognition/model")) == cassette_model
    assert tokenizer_folder(language(folder, "random")) == folder
    (folder / "tokenizer.json").unlink()
    assert tokenizer_folder(language(folder)) is None
    with pytest.raises(XdscaleError, match="no such file or folder"):
        tokenizer_folder(language("./nowhere"))


def test_clip_text_tower_comes_out_of_a_whole_clip(clip_file):
    clip, store = clip_file
    state = clip.state_dict()
    encoder = load_clip_text_tower(store(state))
    assert torch.equal(encoder.tower.text_projection, state["text_projection"])
    for name, value in encoder.tower.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert encoder.logit_scale.item() == state["logit_scale"].item()
    assert not any("visual" in name for name, _ in encoder.named_modules())


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt"])
@pytest.mark.parametrize("prefix", ["module.", "text.", ""])
def test_clip_state_dicts_of_several_origins(clip_file, name, prefix):
    """Data-parallel checkpoints, open_clip's CustomTextCLIP, and fp16 files with OpenAI's constants."""
    clip, store = clip_file
    state = clip.state_dict()
    stored = {
        prefix * (prefix == "module." or not key.startswith(("visual.", "logit"))) + key: value.half()
        for key, value in state.items()
    }
    stored["input_resolution"] = torch.tensor(32)
    encoder = load_clip_text_tower(store(stored, name))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    for key, value in encoder.tower.state_dict().items():
        assert torch.equal(value, state[key].half().float()), key


def test_clip_training_checkpoints_are_unwrapped(clip_file, tmp_path):
    clip, store = clip_file
    spec = store(clip.state_dict(), "epoch.pt")
    torch.save({"epoch": 3, "state_dict": clip.state_dict()}, tmp_path / "epoch.pt")
    encoder = load_clip_text_tower(spec)
    assert torch.equal(encoder.tower.ln_final.weight, clip.ln_final.weight)


def test_clip_weights_that_do_not_fit(clip_file):
    clip, store = clip_file
    state = clip.state_dict()
    del state["ln_final.bias"]
    state["more"] = torch.zeros(2)
    state["positional_embedding"] = torch.zeros(76, 24)
    message = (
        r"clip\.safetensors: .*missing ln_final\.bias; unexpected more; "
        r"of another shape positional_embedding \[76, 24\], expected \[77, 24\]"
    )
    with pytest.raises(XdscaleError, match=message):
        load_clip_text_tower(store(state))


def test_clip_weights_that_are_no_numbers(clip_file):
    clip, store = clip_file
    state = clip.state_dict()
    spoilt = state | {"text_projection": torch.full_like(state["text_projection"], torch.nan)}
    with pytest.raises(XdscaleError, match=r"clip\.safetensors: text_projection: not all values are finite"):
        load_clip_text_tower(store(spoilt))
    with pytest.raises(XdscaleError, match=r"clip\.safetensors: logit_scale: not all values are finite"):
        load_clip_text_tower(store(state | {"logit_scale": torch.tensor(torch.inf)}))
    spoilt = state | {"text_projection": state["text_projection"].to(torch.int8)}
    with pytest.raises(XdscaleError, match=r"clip\.safetensors: text_projection: int8, expected floating point; quant"):
        load_clip_text_tower(store(spoilt))


def test_torchscript_is_refused(clip_file, tmp_path):
    _, store = clip_file
    spec = store({}, "jit.pt")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "jit.pt"))
    with pytest.raises(XdscaleError, match=r"jit\.pt: a TorchScript archive.*\.safetensors"):
        load_clip_text_tower(spec)


def test_code_in_a_clip_file_does_not_run(clip_file, tmp_path):
    _, store = clip_file
    spec = store({}, "evil.pt")
    spoil(tmp_path / "evil.pt", tmp_path / "ran")
    with pytest.raises(XdscaleError, match=r"evil\.pt: not a readable weights file: .*other things than"):
        load_clip_text_tower(spec)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["torn.safetensors", "torn.pt"])
def test_torn_clip_files(clip_file, tmp_path, name):
    clip, store = clip_file
    spec = store(clip.state_dict(), name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(XdscaleError, match=rf"{name}: not a readable weights file"):
        load_clip_text_tower(spec)


def test_archives_of_other_things_are_refused(clip_file, tmp_path):
    _, store = clip_file
    spec = store({}, "other.pt")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "other.pt").write_bytes(buffer.getvalue())
    with pytest.raises(XdscaleError, match=r"other\.pt: not a readable weights file"):
        load_clip_text_tower(spec)


def test_clip_tags_and_names():
    with pytest.raises(XdscaleError, match="'opneai': not a file and not a tag of ViT-B-32.*openai, laion400m"):
        load_clip_text_tower(Clip(name="ViT-B-32", weights="opneai"))
    with pytest.raises(XdscaleError, match="'openai': could not be fetched.*'random'"):
        load_clip_text_tower(Clip(name="ViT-B-32", weights="openai"))
    with pytest.raises(XdscaleError, match="'ViT-Q': not an architecture of open_clip"):
        clip_config(Clip(name="ViT-Q", weights="random"))
    with pytest.raises(XdscaleError, match=r"none\.safetensors: no such file"):
        load_clip_text_tower(Clip(name="ViT-B-32", weights="none.safetensors"))


@pytest.mark.parametrize(
    ("name", "weights", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B/32", "openai", True),
        ("ViT-B-32", "random", True),
        ("ViT-B-32", "my-own.safetensors", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu", "random", True),
        ("ViT-H-14", "random", False),
        ("clip-tiny.json", "random", True),
    ],
)
def test_activation_is_the_one_of_the_weights(name, weights, quick):
    """Spec xdbert §2.2: x·σ(1.702x) in OpenAI's; LAION's ViT-B-32 was trained with GELU."""
    assert clip_config(Clip(name=name, weights=weights)).quick_gelu is quick


def test_the_activation_reaches_the_tower(clip_tiny):
    encoder = load_clip_text_tower(Clip(name=str(clip_tiny), weights="random"))
    assert [block.mlp.c_proj.activation for block in encoder.tower.transformer.resblocks] == [quick_gelu] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embed_dim": 24}, "'text_cfg' is missing"),
        ({"embed_dim": 24, "text_cfg": TEXT | {"wdith": 3}}, "'text_cfg.wdith'; did you mean 'width'"),
        ({"embed_dim": 24, "text_cfg": TEXT | {"context_length": 64}}, "text_cfg.context_length = 64"),
        ({"embed_dim": 25, "text_cfg": TEXT}, "embed_dim = 25 is not a multiple of text_cfg.heads = 3"),
        ({"embed_dim": 24, "text_cfg": TEXT | {"width": 25}}, "text_cfg.width = 25 is not a multiple"),
    ],
)
def test_bad_clip_configurations(tmp_path, values, message):
    (tmp_path / "clip.json").write_text(json.dumps(values))
    with pytest.raises(XdscaleError, match=re.escape(message)):
        clip_config(Clip(name=str(tmp_path / "clip.json"), weights="random"))


@pytest.mark.parametrize("name", ["roberta-ViT-B-32", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_other_text_towers_are_refused(name):
    with pytest.raises(XdscaleError, match=f"'{name}': its text tower is not a plain CLIP text tower"):
        clip_config(Clip(name=name, weights="random"))
