"""The release's VL-BERT on padded tensors, with weights and files of its own: what tests compare with."""

import pytest
import torch

from xdscale.bench.padded_vlbert import PaddedVLBERT

SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 96}
SIZES |= {"vocab_size": 99, "max_position_embeddings": 40, "hidden_dropout_prob": 0.1, "pad_token_id": 0}


def loaded(path, config, **options):
    """The release's module with the weights of a `.model` file, all of which it must have."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(config, name) for name in names}
    model = PaddedVLBERT(sizes, appearance=config.appearance_size, with_pooler=config.with_pooler, **options)
    state = torch.load(path, weights_only=True)["state_dict"]
    found = model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"vlbert.mlm_head.predictions.decoder.bias"}  # another name of a bias
    return model.eval()


def reference(**options):
    """The release's module, whose norms and vectors are not those of the start."""
    torch.manual_seed(1)
    model = PaddedVLBERT(SIZES, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    return model.eval()


@pytest.fixture
def release(tmp_path):
    """Returns the release's module and the `.model` file that it would save."""

    def of(**options):
        theirs, path = reference(**options), tmp_path / "vl-bert.model"
        state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state, "rng": [1, 2]}, path)
        return theirs, path

    return of
