# SPDX-License-Identifier: Apache-2.0
"""Configuration: NeoX YAML keys in, one frozen typed tree out. No torch, no numpy."""

from libneox.config.batch import BatchPlan
from libneox.config.load import load_config
from libneox.config.presets import Preset, list_presets
from libneox.config.tree import NeoxConfig, all_keys

__all__ = ["BatchPlan", "NeoxConfig", "Preset", "all_keys", "list_presets", "load_config"]
