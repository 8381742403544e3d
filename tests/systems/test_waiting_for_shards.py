"""While shards are hashed or fetched the watchdog hears of each, whatever is trained: no rank is taken for hung."""

from types import SimpleNamespace

import pytest

from xdscale.finetune.run import FinetuneSystem
from xdscale.recipe import load_recipe
from xdscale.systems.contract import Place, open_system

RANKS = SimpleNamespace(world_size=1, rank=0)


class Asked(Exception):
    """Instead of looking at shards."""


def look(*_, on_shard=None, **__):
    raise Asked(on_shard)


def tick():
    """Of the watchdog."""


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("quickstart-mlm", "data.opening.open_shards"),
        ("quickstart", "data.opening.open_shards"),
        ("quickstart-visualbert", "data.opening.open_shards"),
        ("vlbert-base-precomputed", "systems.vlbert.open_shards"),
        ("visualbert-nlvr2-task", "tasks.visualbert_pretraining.verify_table"),
        (None, "finetune.run.verify_table"),
    ],
)
def test_the_watchdog_hears_of_each_shard(name, place, monkeypatch, tmp_path):
    monkeypatch.setattr(f"xdscale.{place}", look)
    for module in ("tasks.visualbert_pretraining", "finetune.run"):
        monkeypatch.setattr(f"xdscale.{module}.open_regions", lambda name: SimpleNamespace(width=0, table=name))
    monkeypatch.setattr("xdscale.tasks.visualbert_pretraining.check_inputs", lambda recipe, width: None)
    if name is not None:
        system = open_system(load_recipe(name))
    else:
        system = FinetuneSystem.__new__(FinetuneSystem)
        system.recipe = SimpleNamespace(
            output=SimpleNamespace(folder=tmp_path), data=SimpleNamespace(regions="r"), run=SimpleNamespace(verify=True)
        )
    with pytest.raises(Asked) as asked:
        system.open(Place(RANKS, 1, tick))
    assert asked.value.args == (tick,)
