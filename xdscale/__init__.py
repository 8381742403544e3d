"""xdscale: trains language models that know what things look like, from text alone or with image regions.

From Python: `open_table`, `load_encoder`, `load_cross_modal`; the kernels by name in `xdscale.kernels`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdscale.encoder import Encoded, Encoder, load_cross_modal, load_encoder
    from xdscale.errors import XdscaleError
    from xdscale.shards.table import open_table

__version__ = "0.1.0"

__all__ = ["Encoded", "Encoder", "XdscaleError", "__version__", "load_cross_modal", "load_encoder", "open_table"]

_HOMES = {"XdscaleError": "xdscale.errors", "open_table": "xdscale.shards.table"}


def __getattr__(name: str) -> Any:
    """Imports what stands behind a name when it is first asked for: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'xdscale' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "xdscale.encoder")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
