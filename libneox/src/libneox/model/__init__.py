# SPDX-License-Identifier: Apache-2.0
"""The model: modules, initial values, loss, key/value cache. No mesh, rank or device policy lives here."""

from libneox.model.cache import KVCache
from libneox.model.init import init_weights
from libneox.model.transformer import Transformer

__all__ = ["KVCache", "Transformer", "init_weights"]
