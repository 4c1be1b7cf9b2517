# SPDX-License-Identifier: Apache-2.0
"""What a configuration may ask for that is installed apart. Looked for before anything heavy is imported."""

from __future__ import annotations

import importlib.util

from libneox.config import NeoxConfig
from libneox.errors import UsageError

_WANTED = {
    "tensorboard_dir": ("tensorboard", "neox-train[tensorboard]"),
    "use_wandb": ("wandb", "neox-train[wandb]"),
    "use_comet": ("comet_ml", "neox-train[comet]"),
    "use_bnb_optimizer": ("bitsandbytes", "neox-train[bitsandbytes]"),
    "eval_tasks": ("neox_eval", "neox-eval"),
}


def check_installed(config: NeoxConfig) -> None:
    """Raise UsageError, with the remedy, if a library that is asked for is not installed."""
    for key, (library, package) in _WANTED.items():
        if config.get(key) and importlib.util.find_spec(library) is None:
            raise UsageError(f"{key}: {library} is not installed; pip install '{package}'")
