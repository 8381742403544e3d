"""Pages are executed as their readers execute them."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_page():
    """Returns a function (a page's commands, each with what runs in its place, folder) -> what each printed."""

    def of(commands, folder):
        settings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        settings |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        outputs = {}
        for command, smaller in commands.items():
            done = subprocess.run(
                ["bash", "-c", smaller],
                cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=400, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            outputs[command] = done.stdout
        return outputs

    return of


@pytest.fixture(scope="session")
def export_of_regions(cassette_model):
    """Returns a function (folder, width of features): writes a new VisualBERT there, or VL-BERT, as if exported."""
    from xdscale.pretrained import visualbert, vlbert
    from xdscale.pretrained.language import load_language_encoder
    from xdscale.recipes.mlm.schema import Language

    def of(folder, width, *, vl_bert=False):
        bert = load_language_encoder(Language(name=str(cassette_model)), dropout=0.1)
        if vl_bert:
            model, save = vlbert.from_bert(bert, appearance_size=width), vlbert.save_vlbert
        else:
            model = visualbert.from_bert(bert, region_size=width)
            save = partial(visualbert.save_visualbert, alignment="mean")
        folder.mkdir()
        save(model.config, {f"model.{name}": value for name, value in model.state_dict().items()}, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(cassette_model / name, folder)

    return of
