import pytest

from xdscale.commands.params import print_parameters
from xdscale.errors import XdscaleError
from xdscale.plan.profile import parameter_table
from xdscale.recipe import load_recipe
from xdscale.recipes.xdbert.schema import XDBERTRecipe


def spec(language, *, layers=2, objectives=None):
    return XDBERTRecipe(
        system="xdbert",
        model={
            "language": {"name": str(language), "weights": "pretrained"},
            "clip": {"name": "ViT-B-32", "weights": "openai"},
            "cross_layers": layers,
        },
        objectives=objectives or {},
        data={"shards": "unused"},
        training={"steps": 1, "global_batch": 1},
        output={"folder": "unused"},
    )


def counts(*arguments, **keywords):
    return [row.parameters for row in parameter_table(spec(*arguments, **keywords))]


def test_bert_base():
    """Spec xdbert §10 fact 1, §2.5: paper table 6, and the adaptation total without the release's unused layer."""
    assert counts("bert-base-uncased") == [
        109_482_240,
        63_165_952,
        262_145,
        14_574_336,
        202_059_009,
        622_650,
        590_592 + 1_538,
        313_088,
        203_587_903 - 1_026,
    ]


def test_electra_large():
    """Spec xdbert §10 fact 1, §2.5: paper table 6."""
    assert counts("google/electra-large-discriminator")[:5] == [
        334_092_288,
        63_165_952,
        262_145,
        22_575_616,
        442_671_617,
    ]


def test_electra_base():
    """Spec xdbert §2.5, caveat."""
    assert counts("google/electra-base-discriminator")[4] == 201_468_417


def test_one_layer_and_fewer_heads():
    rows = parameter_table(spec("bert-base-uncased", layers=1, objectives={"match": None, "clip_tokens": None}))
    assert [row.part for row in rows[4:]] == [
        "model with 1 cross-modal layer",
        "masked-LM head",
        "model during training",
    ]
    assert rows[-1].parameters == 202_059_009 - 14_574_336 + 622_650
    assert [row.total for row in rows] == [False] * 4 + [True, False, True]


def test_local_folders_need_only_their_configuration(cassette_model, tmp_path):
    (tmp_path / "config.json").write_bytes((cassette_model / "config.json").read_bytes())
    # word 30,522 + positions 512 + segments 2, all x 128, embedding norm; 2 layers of 198,272; pooler
    assert counts(tmp_path)[0] == (30_522 + 512 + 2) * 128 + 256 + 2 * 198_272 + 128 * 128 + 128


def test_unknown_architecture():
    with pytest.raises(XdscaleError, match="^nobody/no-such-bert: no such folder"):
        parameter_table(spec("nobody/no-such-bert"))


def test_printed_table(capsys):
    print_parameters(spec("bert-base-uncased"))
    printed = capsys.readouterr().out
    for number in ("109,482,240", "63,165,952", "14,574,336", "202,059,009", "203,586,877"):
        assert number in printed


@pytest.mark.parametrize(
    ("name", "totals"),
    [
        ("bert-base-mlm-wikitext103", [True, False, True]),
        ("quickstart-visualbert", [True, False, False, True]),
        ("quickstart-vlbert", [False] * 4 + [True]),
        ("vlbert-base-e2e", [False] * 4 + [True, False, True]),
    ],
)
def test_lines_that_sum_up_others_are_marked(name, totals):
    """The last one counts everything once."""
    rows = parameter_table(load_recipe(name))
    assert [row.total for row in rows] == totals
    parts = sum(row.parameters for row in rows if not row.total)
    if totals[0]:
        parts += rows[0].parameters
    assert rows[-1].parameters == parts
