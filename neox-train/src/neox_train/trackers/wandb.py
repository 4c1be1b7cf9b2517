# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases. `WANDB_MODE=offline` writes to RUN/wandb, for `wandb sync`; keys come from its own login."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from libneox.config import NeoxConfig
from libneox.errors import UsageError


class WeightsAndBiases:
    """See `neox_train.trackers.Tracker`."""

    def __init__(self, config: NeoxConfig, run: Path, ident: str, rank: int):
        """Begin the run `ident`, or go on with it.

        Raises:
            UsageError: nobody is logged in, or the server does not take it.
        """
        import wandb

        log = config.log
        settings = wandb.Settings(console="off", silent=True)  # stdout and stderr of this process stay its own
        if config.is_set("wandb_host"):
            settings.base_url = log.wandb_host
        name = log.wandb_run_name
        many = log.wandb_init_all_ranks
        try:
            self._run = wandb.init(
                project=log.wandb_project,
                entity=log.wandb_team,
                group=log.wandb_group or (name or ident if many else None),
                name=f"{name}-rank{rank}" if name and many else name,
                id=f"{ident}-rank{rank}" if many else ident,
                resume="allow",
                dir=str(run),
                config=config.to_dict(),
                settings=settings,
            )
        except (wandb.errors.Error, OSError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"use_wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline") from error
        # not its own counter, which cannot go back to the step that a resumed run goes on from
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """One row."""
        self._run.log(dict(figures) | {"step": step})

    def close(self, code: int) -> None:
        """Send what is left."""
        self._run.finish(exit_code=code)
