# SPDX-License-Identifier: Apache-2.0
"""neox-train: the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, Literal

import typer

from libneox import cli
from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.config import NeoxConfig

PROG = "neox-train"


def train(
    config: Annotated[
        list[str] | None, typer.Argument(help="YAML files and preset names, for example pythia/160M.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key; wins over the files.")
    ] = None,
    conf_dir: Annotated[Path | None, typer.Option("-d", "--conf-dir", help="Where the files are looked up.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained, and stop.")] = False,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the effective YAML, and stop.")] = False,
    list_presets: Annotated[bool, typer.Option("--list-presets", help="Print the presets, and stop.")] = False,
    help_config: Annotated[
        str | None, typer.Option("--help-config", metavar="KEY", help="Explain a key of the configuration, and stop.")
    ] = None,
    step_timeout: Annotated[
        float,
        typer.Option(
            "--step-timeout", min=1, max=1e7, help="Seconds after which a rank that does not answer is given up."
        ),
    ] = 1800.0,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    as_json: cli.Json = False,
    quiet: cli.Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Train a language model as NeoX YAML files describe it.

    Prints the path of each finished checkpoint on stdout, a line each. The same command, run again, continues the run.
    """
    if list_presets or help_config:
        _answer(stdout, help_config, as_json)
        return
    if not config and not settings:
        raise UsageError(f"no configuration; name YAML files or a preset (see {PROG} --list-presets)")
    from libneox.config import load_config

    loaded = load_config(config or [], overrides=settings or [], conf_dir=conf_dir)
    if loaded.log.log_dir and not (print_config or dry_run):
        from libneox.parallel.launch import discover
        from neox_train.log_copy import copy_stderr

        copy_stderr(loaded.log.log_dir, discover(os.environ).rank)
    for warning in loaded.warnings:
        cli.warn(PROG, f"warning: {warning}")
    if print_config:
        stdout.write(loaded.to_yaml().encode())
        return
    if dry_run:
        _dry_run(stdout, loaded, as_json)
        return
    start_training(loaded, stdout, quiet=quiet, step_timeout=step_timeout)


def _answer(stdout: BinaryIO, key: str | None, as_json: bool) -> None:
    if key is not None:
        from libneox.config.reference import help_key

        text = help_key(key)
        stdout.write((json.dumps({"key": key, "help": text}) if as_json else text.rstrip("\n")).encode() + b"\n")
        return
    from libneox.config import list_presets

    for preset in list_presets():
        if as_json:
            line = json.dumps({"name": preset.name, "parameters": preset.parameters, "summary": preset.summary})
        else:
            line = f"{preset.name:<24} {preset.parameters:>16,}  {preset.summary}"
        stdout.write(line.encode() + b"\n")


def _dry_run(stdout: BinaryIO, config: NeoxConfig, as_json: bool) -> None:
    from libneox.config.estimate import dry_run, render

    facts = dry_run(config)
    text = json.dumps(facts) if as_json else render(facts).rstrip("\n")
    stdout.write(text.encode() + b"\n")


def start_training(config: NeoxConfig, stdout: BinaryIO, *, quiet: bool, step_timeout: float) -> None:
    """Everything that can be wrong without torch is found before torch is imported."""
    from libneox.config.support import check_supported
    from libneox.parallel.launch import discover, unled
    from neox_train.extras import check_installed

    launch = discover(os.environ)
    if launch.launcher == "none" and (warning := unled(os.environ)):
        cli.warn(PROG, f"warning: {warning}")
    if config.mup.coord_check:
        if launch.world_size > 1:
            raise UsageError("coord_check: is made by one process; start it without a launcher")
        check_supported(config)
        from neox_train.coord_check import coordinate_check

        coordinate_check(config, stdout, quiet=quiet)
        return
    check_supported(config, launch.world_size)
    check_installed(config)
    from neox_train.session import Options, run

    run(config, launch, Options(stdout=stdout.fileno(), quiet=quiet, step_timeout_s=step_timeout))


BENCH_BATCH_CPU = 2
_CPU_BATCH = f"Samples of a micro-batch; default: the preset's, on a CPU {BENCH_BATCH_CPU}."


def bench(
    config: Annotated[list[str] | None, typer.Argument(help="Presets and YAML files; default pythia/160M.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a key; wins over the files.")
    ] = None,
    versus: Annotated[Literal["hf"] | None, typer.Option("--vs", help="Measure transformers beside it.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help=_CPU_BATCH)] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps of a round.")] = 3,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds; with --vs they take turns.")] = 5,
    as_json: cli.Json = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Measure the training step of a configuration beside the limits of this machine.

    One process, random tokens, one micro-batch a step (--set gradient_accumulation_steps=N for more).
    """
    from libneox.config import load_config
    from libneox.config.support import check_supported

    loaded = load_config(config or ["pythia/160M"], overrides=settings or [])
    check_supported(loaded.replace(data_path="random tokens"))
    from neox_train.benchmark import benchmark, prepared, render

    asked = {word.partition("=")[0].replace("-", "_") for word in settings or []}
    loaded = prepared(loaded, asked, batch, cpu_batch=BENCH_BATCH_CPU)
    result = benchmark(loaded, versus=versus is not None, steps=steps, rounds=rounds)
    stdout.write((json.dumps(result) + "\n" if as_json else render(result)).encode())


def main() -> None:
    """Entry point."""
    cli.run(PROG, train, {"bench": bench})
