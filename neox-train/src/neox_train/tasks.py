# SPDX-License-Identifier: Apache-2.0
"""`eval_tasks`: neox-eval, as a process of its own, on the checkpoint that was just committed. No torch.

Training waits for it, so that the two never want the memory of a device at the same time; an evaluation that fails
costs a warning. Its figures belong to the step of the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from libneox import run_directory
from libneox.config import NeoxConfig
from libneox.files import write_text
from libneox.parallel.group import Group
from libneox.parallel.launch import without_launcher

PATIENCE_S = 5.0  # for an evaluation that is told to end


class Tasks:
    """Evaluates steps of a run. Every rank has one; rank 0 starts the process and the others stand by."""

    def __init__(
        self,
        config: NeoxConfig,
        run: Path,
        group: Group,
        device: str,
        *,
        asked: Callable[[], bool],
        mark: Callable[[int], None],
        warn: Callable[[str], None],
    ):
        """`asked`: whether somebody wants the run to stop; `mark` is told while it waits that this rank is alive."""
        self._tasks, self._every = config.train.eval_tasks or [], config.train.eval_interval
        self._run, self._group, self._device = run, group, device
        prefix = config.train.eval_results_prefix
        self._prefix = f"{prefix}_" if prefix else f"{run}/"
        self._asked, self._mark, self._warn = asked, mark, warn

    def due(self, step: int) -> bool:
        """Whether a step is to be saved and evaluated."""
        return step % self._every == 0

    def path(self, step: int) -> Path:
        """The file of a step's results, as neox-eval printed them."""
        return Path(f"{self._prefix}eval_results_step_{step}.json")

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of a committed step, `TASK/METRIC`, on rank 0; empty if there are none. Every rank calls it."""
        child = self._start(step) if self._group.is_first else None

        def asked() -> bool:
            self._mark(step)
            return self._asked()

        stopped = self._group.stand_by(lambda: child is not None and child.poll() is None, asked)
        if child is None:
            return {}
        if stopped and child.poll() is None:
            _end(child)
            with contextlib.suppress(OSError):
                self._taken(step)
            self._warn(f"eval_tasks: the evaluation of step {step} was stopped with the run")
            return {}
        return self._results(step, child.returncode)

    def _start(self, step: int) -> subprocess.Popen[bytes] | None:
        command = [sys.executable, "-P", "-m", "neox_eval", str(run_directory.step_path(self._run, step))]
        command += ["--tasks", ",".join(self._tasks), "--device", self._device, "--quiet"]
        try:
            self.path(step).parent.mkdir(parents=True, exist_ok=True)
            with self._scratch(step, "out").open("wb") as out, self._scratch(step, "err").open("wb") as err:
                env = without_launcher(os.environ)
                return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        except OSError as error:
            self._warn(f"eval_tasks: {error}; step {step} is not evaluated")
            return None

    def _scratch(self, step: int, kind: str) -> Path:
        return self._run / f".eval_step_{step}.{kind}"

    def _taken(self, step: int) -> tuple[bytes, list[str]]:
        """What it wrote to stdout, and the lines of stderr; the files go."""
        out, err = self._scratch(step, "out"), self._scratch(step, "err")
        text, lines = out.read_bytes(), err.read_text(errors="replace").strip().splitlines()
        out.unlink()
        err.unlink()
        return text, lines

    def _results(self, step: int, code: int) -> dict[str, float]:
        try:
            text, lines = self._taken(step)
            if code != 0:
                reason = lines[-1] if lines else "it said nothing"
                self._warn(f"eval_tasks: step {step}: neox-eval exits {code}: {reason}; training goes on")
                return {}
            write_text(self.path(step), text.decode())
            return figures(json.loads(text)["results"])
        except (OSError, ValueError, KeyError) as error:
            self._warn(f"eval_tasks: step {step}: {error}; training goes on")
            return {}


def figures(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The harness's results as `TASK/METRIC`; a filter other than `none` stays in the name."""
    return {
        f"{task}/{name.removesuffix(',none')}": float(value)
        for task, metrics in results.items()
        for name, value in metrics.items()
        if isinstance(value, int | float) and "," in name
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
