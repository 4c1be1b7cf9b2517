# SPDX-License-Identifier: Apache-2.0
"""Where a run begins: afresh, from a step of its own, or from somebody else's checkpoint. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from libneox import run_directory
from libneox.config import NeoxConfig, load_config
from libneox.errors import InputMissing, NeoxError, UsageError
from libneox.legacy import is_legacy
from libneox.model_config import ModelConfig
from libneox.run_directory import CheckpointRef, Warn
from neox_train.remote import LOADED, fetch, is_address

DEFAULT_RUN = "run"
# by the first start, from the data and a trial
_FILLED_IN = ("vocab_size", "padded_vocab_size", "qk_norm_groups", "attention_kernel")


@dataclasses.dataclass(frozen=True)
class Start:
    """The first state of a run.

    Attributes:
        source: checkpoint to read; None: new weights.
        own: it is a step of this very run, which goes on.
        note: what the user should be told.
        again: it was made by the same command, so what that says about loading has been done.
    """

    source: CheckpointRef | None
    own: bool
    note: str
    again: bool = False


def run_path(config: NeoxConfig) -> Path:
    """The run directory: `save`, or ./run."""
    return Path(config.train.save or DEFAULT_RUN)


def find_start(config: NeoxConfig, *, warn: Warn) -> Start:
    """Decide where to begin; the checkpoint found is verified.

    The run's own steps win: the same command, run again, continues. `load` is for the first time, unless it names the
    run directory itself, which may then be absent or empty. `iteration` names a step; where that is the run's own, the
    run goes back to it, once.

    Raises:
        InputMissing: `load` is not there.
        IntegrityError: the step named, or every step of the run, is damaged.
        UsageError: `finetune`, which begins at step 0, from a step of the run itself.
    """
    run, keys = run_path(config), config.train
    if keys.load is not None and is_address(keys.load):
        return _from_address(config, keys.load, warn)
    load = Path(keys.load) if keys.load else None
    same = load is not None and load.resolve() == run.resolve()
    own = load is None or same
    if keys.iteration is not None and not (own and _went_back(config, run)):
        source = _named(load if load is not None else run, keys.iteration)
        if own:
            _check_goes_on(config, run)
        if own or not run_directory.list_steps(run):
            return Start(source, own, f"starting from {source.path}")
    own_step = run_directory.newest_verified(run, warn=warn)
    if own_step is not None:
        return _continued(config, own_step)
    if load is not None and not same:
        source = run_directory.resolve_checkpoint(load, warn=warn)
        if source.kind == "legacy":
            raise InputMissing(f"{load}: a GPT-NeoX checkpoint; import it: neox-convert from-neox {load} RUN")
        return Start(source, False, f"starting from {source.path}")
    if is_legacy(run):
        raise InputMissing(
            f"{run}: holds a GPT-NeoX checkpoint; import it (neox-convert from-neox {run} RUN) and set save: RUN, "
            "or save elsewhere to start afresh"
        )
    return Start(None, False, f"{run}: no checkpoint there yet, starting afresh")


def _from_address(config: NeoxConfig, url: str, warn: Warn) -> Start:
    """A step that is fetched first: into the run itself if the run's copies are there, else into RUN/loaded."""
    run, keys = run_path(config), config.train
    same = keys.s3_path is not None and keys.s3_path.rstrip("/") == url.rstrip("/")
    goes_back = same and keys.iteration is not None and not _went_back(config, run)
    if run_directory.list_steps(run) and not goes_back:
        own = run_directory.newest_verified(run, warn=warn)
        assert own is not None
        return _continued(config, own)
    if same:
        _check_goes_on(config, run)
    path = fetch(url, run if same else run / LOADED, step=keys.iteration, warn=warn)
    source = run_directory.resolve_checkpoint(path)
    note = f"starting from {path}, a copy of {url}"
    return Start(source, same, note, again=same and made_by_same_command(config, path))


def _continued(config: NeoxConfig, step: CheckpointRef) -> Start:
    note = f"continuing {run_path(config)} after step {step.step}"
    return Start(step, True, note, again=made_by_same_command(config, step.path))


def _check_goes_on(config: NeoxConfig, run: Path) -> None:
    if config.train.finetune:
        raise UsageError(f"finetune: begins at step 0, and {run} is the run it would begin from; give another `save`")


def _went_back(config: NeoxConfig, run: Path) -> bool:
    """Whether the run has gone back to `iteration` by this command, and on from there."""
    steps = run_directory.list_steps(run)
    return bool(steps) and made_by_same_command(config, run_directory.step_path(run, steps[-1]))


def made_by_same_command(config: NeoxConfig, step: Path) -> bool:
    """Whether a step was made with this configuration; what a run fills in at its start does not count."""
    try:
        stored = stored_config(step).to_dict()
    except (NeoxError, OSError):  # damaged: whoever reads the step says so
        return False
    filled_in = set(_FILLED_IN)
    if config.train.use_checkpoint_lr_scheduler:
        filled_in |= {"optimizer", *(field.name for field in dataclasses.fields(config.schedule))}
    ours = config.to_dict()
    return all(stored.get(name) == ours.get(name) for name in {*stored, *ours} - filled_in)


def _named(place: Path, step: int) -> CheckpointRef:
    path = run_directory.step_path(place, step)
    if not path.is_dir():
        known = ", ".join(map(str, run_directory.list_steps(place)[-8:])) or "none"
        raise InputMissing(f"{path}: no such checkpoint (iteration: {step}); steps there: {known}")
    return run_directory.resolve_checkpoint(path)


def stored_config(step: Path) -> NeoxConfig:
    """The configuration a step was made with."""
    return load_config([step / run_directory.CONFIG])


# What may differ between the checkpoint and the configuration without changing what its tensors mean.
_FREE = (
    "vocab_size", "seq_length", "max_position_embeddings", "hidden_dropout", "attention_dropout", "init_method",
    "output_layer_init_method", "init_method_std", "attention_softmax_in_fp32", "rope_scaling", "rotary_base",
    "sliding_window", "apply_query_key_layer_scaling", "mup_init_scale",
)  # fmt: skip


def check_same_model(ours: ModelConfig, stored: ModelConfig, source: Path) -> None:
    """Raise UsageError, naming every difference, unless the checkpoint's tensors fit the configured model."""
    differences = [
        f"{field.name} is {getattr(ours, field.name)}, the checkpoint has {getattr(stored, field.name)}"
        for field in dataclasses.fields(ours)
        if field.name not in _FREE and getattr(ours, field.name) != getattr(stored, field.name)
    ]
    if ours.pos_emb == "learned" and ours.max_position_embeddings != stored.max_position_embeddings:
        differences.append(
            f"max_position_embeddings is {ours.max_position_embeddings}, the checkpoint has "
            f"{stored.max_position_embeddings}"
        )
    if differences:
        raise UsageError(f"{source}: another model: {'; '.join(differences)}; use its configuration or another `save`")
