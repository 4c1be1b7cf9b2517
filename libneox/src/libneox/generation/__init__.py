# SPDX-License-Identifier: Apache-2.0
"""Generation: text from a model. `generate` for a call, `Engine` for many."""

from libneox.generation.engine import Completion, Engine, Request, generate
from libneox.generation.sampling import Sampling

__all__ = ["Completion", "Engine", "Request", "Sampling", "generate"]
