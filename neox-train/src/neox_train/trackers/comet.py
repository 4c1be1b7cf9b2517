# SPDX-License-Identifier: Apache-2.0
"""Comet. `COMET_START_ONLINE=false` writes an archive to RUN/comet, for `comet upload`; its key is its own affair."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from libneox.config import NeoxConfig
from libneox.errors import UsageError


class Comet:
    """See `neox_train.trackers.Tracker`."""

    def __init__(self, config: NeoxConfig, run: Path, ident: str):
        """Begin the experiment `ident`, or go on with it.

        Raises:
            UsageError: nobody is logged in, or the server does not take it.
        """
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # it would patch torch as that is imported
        import comet_ml

        log = config.log
        settings = comet_ml.ExperimentConfig(
            log_code=False,
            log_graph=False,
            parse_args=False,
            log_git_metadata=False,
            log_git_patch=False,
            auto_output_logging=False,
            auto_param_logging=False,
            auto_metric_logging=False,
            display_summary_level=0,
            offline_directory=os.environ.get("COMET_OFFLINE_DIRECTORY") or str(run / "comet"),
            name=log.comet_experiment_name,
            tags=log.comet_tags,
        )
        try:
            self._experiment = comet_ml.start(
                workspace=log.comet_workspace,
                project_name=log.comet_project,
                experiment_key=ident,
                mode="get_or_create",
                experiment_config=settings,
            )
        except Exception as error:  # ValueError for a missing key, and a family of its own without a common base
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UsageError(f"use_comet: {reason}; run `comet login`, or set COMET_START_ONLINE=false") from error
        self._experiment.log_parameters(config.to_dict())
        if log.comet_others:
            self._experiment.log_others(log.comet_others)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Metrics of a step."""
        self._experiment.log_metrics(dict(figures), step=step)

    def close(self, code: int) -> None:
        """Send what is left."""
        self._experiment.log_other("exit_code", code)
        self._experiment.end()
