# SPDX-License-Identifier: Apache-2.0
"""`neox-convert`: parse, call one function, print one line."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, BinaryIO, NoReturn

import typer

from libneox.cli import Force, Json, Quiet, run
from libneox.errors import UsageError

if TYPE_CHECKING:
    from neox_convert.convert import Options, Report

PROG = "neox-convert"
SHARD_SIZE = "5GB"
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="RUN, RUN/latest or RUN/step_N.")]
Either = Annotated[str, typer.Argument(metavar="CKPT", help="RUN, RUN/step_N, or a Hugging Face directory.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Directory to create.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default as stored.")]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the result with the source before it is kept.")
]
ShardSize = Annotated[str, typer.Option("--max-shard-size", help="Start a new file at this size.")]
TokenizerFile = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Tokenizer file or directory, instead of the one found with the source."),
]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Number of the step that is written.")]


@dataclass(frozen=True)
class Weights:
    """Options of how weights are written."""

    dtype: Dtype = None
    max_shard_size: ShardSize = SHARD_SIZE
    tokenizer: TokenizerFile = None


@dataclass(frozen=True)
class Keeping:
    """Options of how a result is checked, kept and reported."""

    verify: Verify = True
    force: Force = False
    as_json: Json = False
    quiet: Quiet = False


def main() -> NoReturn:
    """Entry point."""
    verbs = {
        "to-hf": to_hf,
        "from-hf": from_hf,
        "from-neox": from_neox,
        "to-neox": to_neox,
        "from-meta": from_meta,
        "inspect": inspect,
        "diff": diff,
        "cast": cast,
        "reshard": reshard,
        "average": average,
        "upload": upload,
    }
    run(PROG, default, verbs)


def default(words: Annotated[list[str] | None, typer.Argument(metavar="VERB ...")] = None) -> None:
    """Convert checkpoints to and from Hugging Face, GPT-NeoX and Meta formats, and look into them."""
    raise UsageError(f"{words[0]!r} is no verb; see {PROG} --help" if words else f"name a verb; see {PROG} --help")


def to_hf(
    checkpoint: Checkpoint,
    output: Out,
    arch: Annotated[str, typer.Option("--arch", help="Family to export to; auto takes the first exact one.")] = "auto",
    trim_vocab: Annotated[
        bool, typer.Option("--trim-vocab", help="Drop the padding rows of embedding and head.")
    ] = False,
    *,
    weights: Weights,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Export a checkpoint as a Hugging Face model directory."""
    from neox_convert import convert

    options = _options(keeping, **vars(weights))
    _print(stdout, keeping, convert.to_hf(checkpoint, output, arch=arch, trim_vocab=trim_vocab, options=options))


def from_hf(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Hugging Face model directory.")],
    output: Out,
    step: Step = None,
    *,
    weights: Weights,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Import a Hugging Face model directory as a checkpoint to evaluate, sample from or train on."""
    from neox_convert import convert
    from neox_convert.source import Where

    options = _options(keeping, **vars(weights))
    where = Where(kind="hf", path=directory)
    _print(stdout, keeping, convert.to_native(where, output, step=step, options=options))


def from_neox(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="GPT-NeoX save directory, or one of its steps.")],
    output: Out,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", help="YAML file of the training run; default the configs/ in the checkpoint."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE on top of it.")] = None,
    qkv_layout: Annotated[
        str, typer.Option("--qkv-layout", help="Rows of query_key_value: heads, blocks, or auto as GPT-NeoX has them.")
    ] = "auto",
    optimizer: Annotated[
        bool, typer.Option("--optimizer/--no-optimizer", help="Import Adam's states, so that training can go on.")
    ] = True,
    step: Step = None,
    *,
    weights: Weights,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Import a checkpoint of the original GPT-NeoX, whatever its layout; executes nothing that is in it."""
    from neox_convert import convert
    from neox_convert.source import Where

    if qkv_layout not in ("auto", "heads", "blocks"):
        raise UsageError(f"--qkv-layout {qkv_layout}: expected auto, heads or blocks")
    options = _options(keeping, **vars(weights))
    where = Where(
        kind="neox",
        path=directory,
        config=tuple(config or ()),
        overrides=tuple(overrides or ()),
        qkv_layout=qkv_layout,
    )
    _print(stdout, keeping, convert.to_native(where, output, step=step, options=options, optimizer=optimizer))


def to_neox(
    checkpoint: Either,
    output: Out,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor-parallel ranks (model_parallel_size).")] = 1,
    layout: Annotated[
        str, typer.Option("--layout", help="pipeline: a file for each layer; sequential: one for each rank.")
    ] = "pipeline",
    dtype: Dtype = None,
    tokenizer: TokenizerFile = None,
    *,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Write the layout of the original GPT-NeoX: weights only, to be loaded there with finetune: true."""
    from neox_convert import convert

    options = _options(keeping, dtype=dtype, tokenizer=tokenizer)
    _print(stdout, keeping, convert.to_neox(checkpoint, output, tensor_parallel=tp, layout=layout, options=options))


def from_meta(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Directory with params.json and consolidated.*.")],
    output: Out,
    seq_length: Annotated[
        int | None,
        typer.Option("--seq-length", min=1, help="Context length; default that of the model's generation."),
    ] = None,
    step: Step = None,
    *,
    weights: Weights,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Import raw weights of Llama 1, 2, 3 or Mistral as their makers publish them."""
    from neox_convert import convert
    from neox_convert.source import Where

    options = _options(keeping, **vars(weights))
    where = Where(kind="meta", path=directory, seq_length=seq_length)
    _print(stdout, keeping, convert.to_native(where, output, step=step, options=options))


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint of any format, or one file of tensors.")],
    stdout: BinaryIO,
    hashes: Annotated[bool, typer.Option("--hash", help="The sha256 of every tensor; reads them all.")] = False,
    as_json: Json = False,
) -> None:
    """List tensors with dtype, shape and size."""
    from neox_convert import look

    look.inspect(path, hashes=hashes, as_json=as_json, stdout=stdout)


def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A checkpoint of any format.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    stdout: BinaryIO,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints tensor by tensor; ends with code 81 if they differ."""
    from neox_convert import look

    look.diff(first, second, as_json=as_json, stdout=stdout)


def cast(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint of ours or a Hugging Face directory.")
    ],
    output: Out,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")],
    max_shard_size: ShardSize = SHARD_SIZE,
    *,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Write a checkpoint in another dtype, in the format it has; optimizer states stay float32."""
    from neox_convert import rewrite

    options = _options(keeping, dtype=dtype, max_shard_size=max_shard_size)
    _print(stdout, keeping, rewrite.rewrite(checkpoint, output, options=options))


def reshard(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint of ours or a Hugging Face directory.")
    ],
    output: Out,
    max_shard_size: ShardSize = SHARD_SIZE,
    *,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Write a checkpoint in files of another size. Any run resumes at any layout without this."""
    from neox_convert import rewrite

    options = _options(keeping, max_shard_size=max_shard_size)
    _print(stdout, keeping, rewrite.rewrite(checkpoint, output, options=options))


def average(
    paths: Annotated[list[str], typer.Argument(metavar="CKPT CKPT... OUT", help="Checkpoints, then the output.")],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Share of a checkpoint; once for each, in order."),
    ] = None,
    step: Step = None,
    *,
    weights: Weights,
    keeping: Keeping,
    stdout: BinaryIO,
) -> None:
    """Average the weights of several checkpoints of one model."""
    from neox_convert import rewrite

    options = _options(keeping, **vars(weights))
    report = rewrite.average(paths[:-1], paths[-1], weights=weight or (), step=step, options=options)
    _print(stdout, keeping, report)


def upload(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Directory made by to-hf.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="NAME or ORGANISATION/NAME on the hub.")],
    stdout: BinaryIO,
    branch: Annotated[str | None, typer.Option("--branch", help="Branch to put it on.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
) -> None:
    """Upload an exported model to the Hugging Face hub, with the token that `hf auth login` stored."""
    from neox_convert.upload import upload as send

    stdout.write(send(directory, repository, branch=branch, private=private, message=message).encode() + b"\n")


def _options(
    keeping: Keeping, *, dtype: str | None = None, max_shard_size: str = SHARD_SIZE, tokenizer: str | None = None
) -> Options:
    from neox_convert.convert import Options

    kept = {"verify": keeping.verify, "force": keeping.force, "quiet": keeping.quiet}
    return Options(dtype=dtype, shard_size=max_shard_size, tokenizer=tokenizer, **kept)


def _print(stdout: BinaryIO, keeping: Keeping, report: Report) -> None:
    """The path of what was made, or all about it."""
    text = json.dumps(dataclasses.asdict(report)) if keeping.as_json else report.output
    stdout.write(os.fsencode(text) + b"\n")
