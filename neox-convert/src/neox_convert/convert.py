# SPDX-License-Identifier: Apache-2.0
"""The conversions: open, write beside the goal, verify, commit."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from libneox.cli import warn
from libneox.errors import UsageError
from libneox.files import atomic_write, write_text
from libneox.progress import Progress
from neox_convert.source import Source, Where, find_source, open_source
from neox_convert.staging import check_apart, check_target, staged_directory
from neox_convert.verify import Job, verify
from neox_convert.writing import (
    cast_all,
    dtype_name,
    native_config,
    parse_bytes,
    parse_dtype,
    write_hf,
    write_native,
)

if TYPE_CHECKING:
    from libneox.checkpoint.lazy import LazyTensor, LazyTensors
    from libneox.checkpoint.neox.optimizer import LegacyState

PROG = "neox-convert"
_STEP = re.compile(r"step_(\d+)")
# GPT-NeoX's tokenizer_type for our kinds of tokenizer, and the file that it reads; it finds tiktoken's by name only
THEIR_TOKENIZERS = {
    "tokenizer.json": ("HFTokenizer", "tokenizer.json"),
    "sentencepiece": ("SPMTokenizer", "tokenizer.model"),
    "charlevel": ("CharLevelTokenizer", None),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What every conversion can be told."""

    dtype: str | None = None
    verify: bool = True
    force: bool = False
    quiet: bool = False
    shard_size: str = "5GB"
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a size or a dtype that is none, before anything is opened."""
        parse_bytes(self.shard_size)
        dtype_name(self.dtype)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done, for `--json`."""

    output: str
    tensors: int
    bytes: int
    seconds: float
    verified: str
    notes: tuple[str, ...]
    architecture: str | None = None


def to_hf(checkpoint: str, output: str, *, arch: str, trim_vocab: bool, options: Options) -> Report:
    """Export a checkpoint of ours, or straight from a foreign format, as a Hugging Face directory.

    Raises:
        NeoxError: of the class that fits; whatever it is, nothing is left at `output`.
    """
    from libneox.checkpoint.hf import choose_family, hf_tensors, open_hf
    from libneox.checkpoint.hf.writer import trim_vocabulary

    target = Path(output)
    check_target(target, force=options.force)
    shard_bytes = parse_bytes(options.shard_size)
    where = find_source(checkpoint)
    if where.kind == "hf":
        raise UsageError(f"{checkpoint}: is a Hugging Face directory already; cast and reshard rewrite one")
    source = open_source(where, options.tokenizer)
    check_apart(target, source.where.path)
    for note in source.notes:
        warn(PROG, note)
    choice = choose_family(source.config, arch)
    _say(options, choice.why)
    tensors, config = cast_all(source.tensors, parse_dtype(options.dtype)), source.config
    if trim_vocab:
        tensors = trim_vocabulary(tensors, config, config.vocab_size)
        config = dataclasses.replace(config, padded_vocab_size=config.vocab_size)
    exported = hf_tensors(tensors, config, choice.family)
    if source.tokenizer is None or source.tokenizer.kind != "tokenizer.json":
        warn(PROG, f"{checkpoint} holds no tokenizer.json, so the export holds no tokenizer; --tokenizer FILE adds one")
    with progress_of(exported.nbytes, options) as progress, staged_directory(target, force=options.force) as staging:
        write_hf(staging, exported, config, choice.family, source.tokenizer, shard_bytes=shard_bytes, progress=progress)
        job = Job(
            ours=source.where,
            dtype=options.dtype,
            theirs=str(staging),
            tokenizer=options.tokenizer,
            check_tokenizer=(staging / "tokenizer.json").is_file(),
            rows=config.padded_vocab_size,
            length=config.max_position_embeddings,
            parameters=_parameters(source),
        )
        verified = check(options, tensors, lambda: open_hf(staging).specs(), job)
    return report_of(target, exported, progress, verified, source.notes, choice.family.architecture)


def to_native(where: Where, output: str, *, step: int | None, options: Options, optimizer: bool = False) -> Report:
    """Make a checkpoint of ours of whatever `where` holds. `optimizer`: with the training state, if there is one."""
    check_target(Path(output), force=options.force)
    source = open_source(where, options.tokenizer)
    for note in source.notes:
        warn(PROG, note)
    return write_source(source, output, step, options, _training_state(source) if optimizer else None)


def write_source(
    source: Source, output: str, step: int | None, options: Options, state: LegacyState | None = None
) -> Report:
    """Write an opened source as a checkpoint of ours.

    `output` becomes a run directory with one step and `latest`; called step_N, it is that step of the run it is in.
    """
    from libneox.checkpoint.lazy import LazyTensors

    target = Path(output)
    check_target(target, force=options.force)
    check_apart(target, source.where.path)
    shard_bytes = parse_bytes(options.shard_size)
    named = _STEP.fullmatch(target.name)
    if named and step is not None and step != int(named[1]):
        raise UsageError(f"{target}: its name says step {named[1]}, --step says {step}")
    number = int(named[1]) if named else source.step if step is None else step
    if state is not None and number != source.step:
        raise UsageError(f"{target}: the training state is that of step {source.step}; it cannot become step {number}")
    tensors = LazyTensors(cast_all(source.tensors, parse_dtype(options.dtype)))
    neox = source.neox if source.where.kind == "native" and source.neox else native_config(source.neox, source.config)
    total = tensors.nbytes + (state.tensors.nbytes if state else 0)
    with progress_of(total, options) as progress, staged_directory(target, force=options.force) as staging:
        written = write_native(
            staging,
            tensors,
            neox,
            source.tokenizer,
            step=number,
            shard_bytes=shard_bytes,
            progress=progress,
            trainer=state.trainer if state else None,
            optimizer=state.tensors if state else None,
            samples=state.samples if state else 0,
            tokens=state.tokens if state else 0,
        )
        result = Where(kind="native", path=str(written))
        job = _import_job(source, result, options)
        verified = check(options, tensors.specs(), lambda: open_source(result).tensors, job)
        if named:
            _lift_step(staging, written)
    if named:
        from libneox.run_directory import list_steps, point_latest

        if number == list_steps(target.parent)[-1]:
            point_latest(target)
    return report_of(target, tensors, progress, verified, source.notes)


def to_neox(checkpoint: str, output: str, *, tensor_parallel: int, layout: str, options: Options) -> Report:
    """Write a checkpoint in GPT-NeoX's own layout: OUT/latest and OUT/global_stepN, weights only."""
    from libneox.checkpoint.lazy import LazyTensors
    from libneox.checkpoint.neox.writer import check_exportable, neox_keys_for_original, write_neox
    from libneox.config import load_config

    target = Path(output)
    check_target(target, force=options.force)
    if layout not in ("pipeline", "sequential"):
        raise UsageError(f"--layout {layout}: expected pipeline or sequential")
    source = open_source(find_source(checkpoint), options.tokenizer)
    check_apart(target, source.where.path)
    check_exportable(source.config, tensor_parallel)
    tensors = LazyTensors(cast_all(source.tensors, parse_dtype(options.dtype)))
    keys = neox_keys_for_original(
        source.neox or native_config(None, source.config), source.config, tensor_parallel=tensor_parallel, layout=layout
    )
    kind = source.tokenizer.kind if source.tokenizer else ""
    their_type, tokenizer_file = THEIR_TOKENIZERS.get(kind, (None, None))
    named = {"tokenizer_type": their_type, "vocab_file": tokenizer_file}
    keys |= {name: value for name, value in named.items() if value is not None}
    with progress_of(tensors.nbytes, options) as progress, staged_directory(target, force=options.force) as staging:
        step = staging / f"global_step{source.step}"
        (step / "configs").mkdir(parents=True)
        write_neox(
            step,
            tensors.specs(),
            source.config,
            tensor_parallel=tensor_parallel,
            layout=layout,
            iteration=source.step,
            tokenizer_type=keys.get("tokenizer_type"),
            written=progress.update,
        )
        write_text(step / "configs" / "config.yml", load_config([keys]).to_yaml())
        if source.tokenizer is not None and tokenizer_file is not None:
            with atomic_write(staging / tokenizer_file) as file:
                file.write(source.tokenizer.data)
        write_text(staging / "latest", step.name)
        result = Where(kind="neox", path=str(staging), vocab_size=source.config.vocab_size)
        verified = check(options, tensors.specs(), lambda: open_source(result).tensors, None)
    return report_of(target, tensors, progress, verified, source.notes)


def _lift_step(staging: Path, written: Path) -> None:
    """Make the staged directory the step itself, where a run with one step was written."""
    (staging / "latest").unlink(missing_ok=True)
    for path in list(written.iterdir()):
        path.rename(staging / path.name)
    written.rmdir()


def _import_job(source: Source, result: Where, options: Options) -> Job | None:
    if source.where.kind != "hf" or options.dtype is not None:
        return None  # transformers would read values that were not yet rounded
    return Job(
        ours=result,
        dtype=None,
        theirs=source.where.path,
        tokenizer=None,
        check_tokenizer=False,
        rows=source.config.padded_vocab_size,
        length=source.config.max_position_embeddings,
        parameters=_parameters(source),
    )


def _training_state(source: Source) -> LegacyState | None:
    """Optimizer states and counters, where there are any that can be read."""
    if source.where.kind == "native":
        return _own_state(source)
    if source.where.kind != "neox":
        return None
    from libneox.checkpoint.neox.optimizer import read_state

    state = read_state(source.details)
    if isinstance(state, str):
        warn(PROG, f"without optimizer states: {state}")
        return None
    return state


def _own_state(source: Source) -> LegacyState | None:
    from libneox.checkpoint.lazy import LazyTensors
    from libneox.checkpoint.neox.optimizer import LegacyState
    from libneox.checkpoint.store import open_tensors, read_trainer

    trainer = read_trainer(source.details.path)
    if trainer is None:
        return None
    manifest = source.details.manifest
    tensors = LazyTensors(open_tensors(source.details.path, "optimizer").lazy())
    return LegacyState(tensors, trainer, manifest.samples, manifest.tokens)


def check(
    options: Options,
    source: Mapping[str, LazyTensor],
    result: Callable[[], Mapping[str, LazyTensor]],
    job: Job | None,
) -> str:
    """Verify a result as `verify` does, unless the user does not want it; returns what to report."""
    if not options.verify:
        return "not verified (--no-verify)"
    sentence = verify(source, result, job)
    _say(options, sentence)
    return sentence


def _parameters(source: Source) -> int:
    return sum(math.prod(tensor.shape) for tensor in source.tensors.values())


def progress_of(total: int, options: Options) -> Progress:
    """Progress in bytes."""
    return Progress(PROG, "bytes", total=total, quiet=options.quiet)


def _say(options: Options, sentence: str) -> None:
    if not options.quiet:
        warn(PROG, sentence)


def report_of(
    target: Path,
    tensors: LazyTensors,
    progress: Progress,
    verified: str,
    notes: tuple[str, ...],
    architecture: str | None = None,
) -> Report:
    """The report on what was written."""
    return Report(
        output=str(target),
        tensors=len(tensors),
        bytes=tensors.nbytes,
        seconds=round(progress.seconds, 3),
        verified=verified,
        notes=notes,
        architecture=architecture,
    )
