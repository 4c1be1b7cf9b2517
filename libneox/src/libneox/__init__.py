# SPDX-License-Identifier: Apache-2.0
"""The library under the neox commands.

Importing `libneox` imports nothing heavy. The torch-free half (configuration, token stream, datasets, tokenizers)
is in its submodules; `load_model` and what it returns need `libneox[torch]` and import torch when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from libneox.checkpoint.load import load_model  # pants: no-infer-dep
    from libneox.generation import generate  # pants: no-infer-dep
    from libneox.tokenizer import load_tokenizer

__all__ = ["generate", "load_model", "load_tokenizer"]

_LAZY = {
    "load_model": "libneox.checkpoint.load",
    "load_tokenizer": "libneox.tokenizer",
    "generate": "libneox.generation",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        from importlib.metadata import version

        return version("libneox")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'libneox' has no attribute {name!r}")
