# SPDX-License-Identifier: Apache-2.0
"""The harness's own command line with our model in it.

lm-eval 0.4.13 does not look for plugins; later ones find `neox` by the entry point of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import BinaryIO


def forward(arguments: Sequence[str], stdout: BinaryIO) -> None:
    """Run `lm_eval ARGUMENTS` with `--model neox` known; what it prints goes to our stdout."""
    # The built-in models first: the harness imports them only while its list is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.api.registry import model_registry

    if "neox" not in model_registry:
        model_registry.register("neox", target="neox_eval.lm:NeoxLM")
    os.dup2(stdout.fileno(), 1)
    sys.argv = ["neox-eval harness", *arguments]
    program = HarnessCLI()
    program.execute(program.parse_args())
    sys.stdout.flush()
