# SPDX-License-Identifier: Apache-2.0
"""Every configuration key, in frozen groups. Nothing about a key is declared anywhere else."""

from libneox.config.keys.data import Data, Tokenizer
from libneox.config.keys.engine import DeepSpeed, Internal, Launch, Parallel, Precision, Recompute
from libneox.config.keys.model import Model, Moe, Mup, Recurrent, TransformerEngine
from libneox.config.keys.speed import Speed
from libneox.config.keys.training import Batch, Generate, LrSchedule, Optim, Post, Train
from libneox.config.keys.watch import Log

__all__ = [
    "Batch",
    "Data",
    "DeepSpeed",
    "Generate",
    "Internal",
    "Launch",
    "Log",
    "LrSchedule",
    "Model",
    "Moe",
    "Mup",
    "Optim",
    "Parallel",
    "Post",
    "Precision",
    "Recompute",
    "Recurrent",
    "Speed",
    "Tokenizer",
    "Train",
    "TransformerEngine",
]
