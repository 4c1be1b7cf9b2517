# SPDX-License-Identifier: Apache-2.0
"""Command lines of neox-shard. Each verb parses, calls one function of its module, and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from libneox.cli import Force, Json, Quiet, run

PROG = "neox-shard"
DEFAULT_OUT = Path("dataset")

Out = Annotated[Path | None, typer.Option("-o", "--out", metavar="PREFIX", help="Output: PREFIX.bin, .idx, .json.")]
Prefix = Annotated[Path, typer.Argument(metavar="PREFIX", help="A dataset, named without .bin or .idx.")]
Prefixes = Annotated[list[Path], typer.Argument(metavar="PREFIX...", help="Datasets, named without .bin or .idx.")]


def main() -> None:
    """Entry point."""
    verbs = (pack, mix, shuffle, merge, cat, info, verify, view, split, join)
    run(PROG, pack, {verb.__name__: verb for verb in verbs})


def pack(
    inputs: Annotated[
        list[Path] | None, typer.Argument(metavar="[STREAM]...", help="Token streams; stdin if none or -.")
    ] = None,
    out: Out = None,
    force: Force = False,
    fail_on_empty: Annotated[
        bool, typer.Option("--fail-on-empty", help="Exit 65 if there is not a single document.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Write a token stream, as neox-tokenize makes it, to PREFIX.bin and PREFIX.idx.

    Labels and rewards in the stream go to PREFIX_label and PREFIX_reward; of several keys each goes to PREFIX_KEY.
    The output appears whole when the stream's end mark was read, or not at all. Without -o it is ./dataset.
    """
    from libneox.cli import warn
    from neox_shard.pack import pack_streams
    from neox_shard.report import print_json

    if out is None:
        out = DEFAULT_OUT
        if not quiet:
            warn(PROG, f"no -o given: writing ./{out}.bin, .idx and .json")
    manifests = pack_streams(inputs or [Path("-")], out, force=force, fail_on_empty=fail_on_empty, quiet=quiet)
    if json:
        print_json(stdout, manifests)


def cat(
    prefixes: Prefixes,
    documents: Annotated[
        str | None, typer.Option(metavar="A:B", help="Only these documents of the whole input, counted from 0.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FILE", help="Tokenizer of data that has none beside it; also `bytes`.")
    ] = None,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Write datasets to stdout as one token stream, to be read by neox-tokenize --decode or neox-shard."""
    from libneox.cli import refuse_terminal
    from neox_shard.cat import cat_datasets

    refuse_terminal(stdout, "a token stream")
    cat_datasets(prefixes, stdout, documents=documents, tokenizer=tokenizer, quiet=quiet)


def info(prefixes: Prefixes, json: Json = False, *, stdout: BinaryIO) -> None:
    """Say what datasets hold: documents, tokens, dtype, tokenizer, files. Reads only the index."""
    from neox_shard.report import describe, print_json, print_table

    found = [describe(prefix) for prefix in prefixes]
    print_json(stdout, found) if json else print_table(stdout, found)


def verify(
    prefixes: Prefixes,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Ids must be below it. Default: what the dataset's tokenizer says.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Read datasets whole: lengths, offsets, document index, ids below the vocabulary size, hashes of the files.

    Exit 65 if a dataset contradicts itself, 81 if its files are not those that were written.
    """
    from neox_shard.report import verify_datasets

    verify_datasets(prefixes, stdout, vocab_size=vocab_size, as_json=json, quiet=quiet)


def mix(
    sources: Annotated[
        list[str], typer.Argument(metavar="PREFIX[=WEIGHT]...", help="Datasets and their shares; no weights: by size.")
    ],
    out: Out = None,
    by: Annotated[str, typer.Option(help="Shares of tokens or of documents.")] = "tokens",
    alpha: Annotated[float | None, typer.Option(help="Shares by size ** alpha instead of weights.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Exact length in tokens, such as 300M; the last document is cut.")
    ] = None,
    documents: Annotated[str | None, typer.Option(metavar="N", help="Exact length in documents.")] = None,
    repeat: Annotated[bool, typer.Option("--repeat", help="Begin a source again when it runs out.")] = False,
    force: Force = False,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Interleave datasets in given shares, document by document.

    Every beginning of the result has the shares asked for. Without a length it ends when the first source runs out.
    Documents of a source keep their order. Without -o the result is a token stream on stdout.
    """
    from neox_shard.mix import Recipe, mix_datasets
    from neox_shard.numbers import parse_count

    lengths = {"tokens": parse_count(tokens, "--tokens"), "documents": parse_count(documents, "--documents")}
    mix_datasets(sources, out, stdout, Recipe(by, alpha, repeat=repeat, **lengths), force=force, quiet=quiet)


def shuffle(
    prefix: Prefix,
    out: Out = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same order, whatever the memory.")] = 1234,
    memory: Annotated[str, typer.Option(metavar="BYTES", help="Data held at a time; more goes over the disk.")] = "1G",
    force: Force = False,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Write the documents of a dataset in random order, also when they do not fit in memory.

    Datasets of as many documents (PREFIX and PREFIX_label) are shuffled alike by the same seed.
    """
    from neox_shard.numbers import parse_count
    from neox_shard.shuffle import shuffle_dataset

    held = parse_count(memory, "--memory") or 1
    shuffle_dataset(prefix, out, stdout, seed=seed, memory=held, force=force, quiet=quiet)


def merge(prefixes: Prefixes, out: Out = None, force: Force = False, quiet: Quiet = False, *, stdout: BinaryIO) -> None:
    """Write datasets one behind the other as one, document index included.

    Without -o the result is a token stream on stdout.
    """
    from neox_shard.merge import merge_datasets

    merge_datasets(prefixes, out, stdout, force=force, quiet=quiet)


def view(
    sources: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="Configuration files, as for neox-train.")],
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
    samples: Annotated[str | None, typer.Option(metavar="A:B", help="Positions in the run, from 0.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="Global batches, from 0.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="X.npy", help="Write int64 [n, seq_length+1]; - is stdout.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="CKPT", help="Of a run that was made longer: take its order from here.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="FILE", help="Decode with this tokenizer.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a sample: tokens, text, labels.")] = False,
    force: Force = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Show the samples that a training run sees at given positions: decoded text, or an array.

    The order is that of a run of the configuration's length from its first step, or that of a checkpoint's run.
    """
    from neox_shard.view import view_samples

    view_samples(
        sources, stdout, split=split, samples=samples, steps=steps, overrides=overrides or [], out=out, as_json=json,
        checkpoint=checkpoint, tokenizer=tokenizer, force=force,
    )  # fmt: skip


def split(
    prefix: Prefix,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="DIR", help="Folder; default: beside it.")] = None,
    piece: Annotated[str, typer.Option("--bytes", metavar="BYTES", help="Length of a piece.")] = "5G",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Cut PREFIX.bin into PREFIX-00000-of-NNNNN.bin with checksums in PREFIX.sha256, for hosts with a size limit."""
    from neox_shard.numbers import parse_count
    from neox_shard.pieces import split_dataset
    from neox_shard.report import print_json

    pieces = split_dataset(prefix, out, piece_bytes=parse_count(piece, "--bytes") or 0, force=force, quiet=quiet)
    if json:
        print_json(stdout, {"pieces": [str(path) for path in pieces]})


def join(prefix: Prefix, out: Out = None, force: Force = False, quiet: Quiet = False) -> None:
    """Put PREFIX-*-of-*.bin together again, checked against PREFIX.sha256 where there is one.

    Without -o PREFIX.bin is made where the pieces are.
    """
    from neox_shard.pieces import join_pieces

    join_pieces(prefix, out, force=force, quiet=quiet)
