# SPDX-License-Identifier: Apache-2.0
"""The command line of neox-tokenize."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, BinaryIO, NoReturn

import typer

from libneox import cli
from libneox.errors import UsageError

PROG = "neox-tokenize"
DEFAULT_TOKENIZER = "NEOX_TOKENIZER"

Files = Annotated[
    list[Path] | None, typer.Argument(metavar="[FILE]...", help="Files and directories; - or none: stdin.")
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", "-t", metavar="PATH",
        help="tokenizer.json, vocab.json, .model, .tiktoken, or a directory with one; bytes, charlevel, tiktoken:NAME. "
        "Default: $NEOX_TOKENIZER, else bytes.",
    ),
]  # fmt: skip
Keys = Annotated[list[str] | None, typer.Option("--key", "-k", metavar="KEY", help="JSON key of the text; a.b goes into objects. Repeatable: each is tokenized to a column of its own. Default: text, with --chat messages.")]  # fmt: skip  # noqa: E501
Format = Annotated[str, typer.Option("--format", help="auto, jsonl, json (one array), text (a file is a document), lines (a line is a document).")]  # fmt: skip  # noqa: E501
OnError = Annotated[str, typer.Option("--on-error", metavar="fail|skip|quarantine=FILE", help="What to do with a record that gives no document.")]  # fmt: skip  # noqa: E501
Errors = Annotated[str, typer.Option("--errors", metavar="strict|replace", help="Invalid Unicode is an error, or becomes U+FFFD.")]  # fmt: skip  # noqa: E501
DuplicateKeys = Annotated[str, typer.Option("--duplicate-keys", metavar="fail|last", help="A key given twice in a record.")]  # fmt: skip  # noqa: E501
Limit = Annotated[int | None, typer.Option("--limit", min=0, help="Stop after this many documents.")]
Workers = Annotated[int | None, typer.Option("--workers", "-j", min=1, help="Threads; the output is the same for any number. Default: one a core.")]  # fmt: skip  # noqa: E501
MaxDocBytes = Annotated[str, typer.Option("--max-doc-bytes", help="Largest document accepted, such as 512M or 2G.")]
Long = Annotated[bool, typer.Option("--long", help="Accept zstd windows up to 2 GiB instead of 128 MiB.")]
Compat = Annotated[str | None, typer.Option("--compat", metavar="neox", help="Read and encode exactly as GPT-NeoX's preprocess_data.py did.")]  # fmt: skip  # noqa: E501


def tokenize(
    files: Files = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Write the token stream to a file, whole or not at all, instead of stdout.",
        ),
    ] = None,  # fmt: skip  # noqa: E501
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="End every document with the tokenizer's end-of-document id.")
    ] = False,  # fmt: skip  # noqa: E501
    eod: Annotated[
        str | None,
        typer.Option("--eod", metavar="TOKEN|ID", help="The end-of-document token, where its name is unusual."),
    ] = None,  # fmt: skip  # noqa: E501
    key: Keys = None,
    format: Format = "auto",
    on_error: OnError = "fail",
    errors: Errors = "strict",
    duplicate_keys: DuplicateKeys = "fail",
    limit: Limit = None,
    workers: Workers = None,
    max_doc_bytes: MaxDocBytes = "1G",
    long: Long = False,
    verify_hash: Annotated[
        str | None,
        typer.Option(
            "--verify-hash",
            metavar="SHA256SUMS",
            help="The input files must have the hashes of this list, as sha256sum writes it.",
        ),
    ] = None,  # fmt: skip  # noqa: E501
    allow_special: Annotated[
        bool,
        typer.Option(
            "--allow-special", help="Special tokens written in a text become their ids; default: ordinary text."
        ),
    ] = False,  # fmt: skip  # noqa: E501
    mask_before: Annotated[
        str | None,
        typer.Option(
            "--mask-before",
            metavar="TOKENS",
            help="Labels without loss up to and with the first occurrence of these ids (27,187) or this text (':\\n').",
        ),
    ] = None,  # fmt: skip  # noqa: E501
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="The values are conversations: lists of messages, made into tokens and labels by the chat template.",
        ),
    ] = False,  # fmt: skip  # noqa: E501
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="FILE",
            help="A Jinja template. Default: that of the tokenizer's tokenizer_config.json.",
        ),
    ] = None,  # fmt: skip  # noqa: E501
    generation_role: Annotated[
        str, typer.Option("--generation-role", help="The loss is on what this role says.")
    ] = "assistant",  # fmt: skip  # noqa: E501
    only_last: Annotated[bool, typer.Option("--only-last", help="The loss is on the last turn alone.")] = False,
    no_mask: Annotated[bool, typer.Option("--no-mask", help="The loss is on everything.")] = False,
    for_rm: Annotated[
        bool, typer.Option("--for-rm", help="For reward models: two end tokens, the loss on the second alone.")
    ] = False,  # fmt: skip  # noqa: E501
    reward_key: Annotated[
        str | None,
        typer.Option("--reward-key", metavar="KEY", help="A number of each record, written beside its tokens."),
    ] = None,  # fmt: skip  # noqa: E501
    binary_reward: Annotated[
        bool, typer.Option("--binary-reward", help="The reward is true or false: 1 or -1.")
    ] = False,  # fmt: skip  # noqa: E501
    ftfy: Annotated[bool, typer.Option("--ftfy", help="Repair broken encodings with ftfy first.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="uint16|int32", help="Type of the ids. Default: by the vocabulary.")
    ] = None,  # fmt: skip  # noqa: E501
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="auto|tokenizers|gigatoken",
            help="auto: the fastest that gives exactly the ids of the tokenizers library.",
        ),
    ] = "auto",  # fmt: skip  # noqa: E501
    compat: Compat = None,
    decode: Annotated[bool, typer.Option("--decode", help="The other way: a token stream in, JSONL out.")] = False,
    fail_on_empty: Annotated[
        bool, typer.Option("--fail-on-empty", help="No document at all is an error (65), not a warning.")
    ] = False,  # fmt: skip  # noqa: E501
    quiet: cli.Quiet = False,
    force: cli.Force = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Text in, tokens out: JSONL, archives or plain text to a token stream on stdout, for neox-shard."""
    if decode:
        _refuse_beside_decode(locals())
        from neox_tokenize.decode import decode_stream

        decode_stream(_paths(files), stdout, limit=limit)
        return
    if out is None:
        cli.refuse_terminal(stdout, "a token stream")
    from neox_tokenize.chat import ChatRules
    from neox_tokenize.run import Options, tokenize_inputs

    if binary_reward and reward_key is None:
        raise UsageError("--binary-reward needs --reward-key")
    rules = ChatRules(generation_role, only_last, not no_mask, for_rm, reward_key, binary_reward)
    options = Options(
        paths=_paths(files), tokenizer=_tokenizer(tokenizer, quiet), append_eod=append_eod, eod=eod,
        keys=tuple(key or ["messages" if chat else "text"]), format=format, on_error=on_error, errors=errors,
        duplicate_keys=duplicate_keys, limit=limit, workers=workers or _cores(), long=long, verify_hash=verify_hash,
        max_doc_bytes=parse_size(max_doc_bytes), allow_special=allow_special, mask_before=mask_before, ftfy=ftfy,
        dtype=dtype, engine=engine, compat=compat, fail_on_empty=fail_on_empty, chat=chat,
        chat_template=chat_template, chat_rules=rules, quiet=quiet, force=force, live=out is not None,
    )  # fmt: skip
    tokenize_inputs(options, stdout, out)


def train(
    files: Files = None,
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", min=256, help="Ids of the finished tokenizer, specials included.")
    ] = 32000,  # fmt: skip  # noqa: E501
    special: Annotated[
        list[str] | None,
        typer.Option(
            "--special", metavar="TOKEN", help="Special tokens, from id 0 on. Default: <|endoftext|> <|padding|>."
        ),
    ] = None,  # fmt: skip  # noqa: E501
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the tokenizer.json goes; - is stdout.")
    ] = Path("tokenizer.json"),  # fmt: skip  # noqa: E501
    min_frequency: Annotated[
        int, typer.Option("--min-frequency", min=0, help="Pairs seen less often are not merged.")
    ] = 2,  # fmt: skip  # noqa: E501
    key: Keys = None,
    format: Format = "auto",
    on_error: OnError = "fail",
    errors: Errors = "strict",
    duplicate_keys: DuplicateKeys = "fail",
    limit: Limit = None,
    max_doc_bytes: MaxDocBytes = "1G",
    long: Long = False,
    quiet: cli.Quiet = False,
    force: cli.Force = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Train a byte-level BPE tokenizer on the texts and write its tokenizer.json."""
    from neox_tokenize.run import Options
    from neox_tokenize.train import train_tokenizer

    options = Options(
        paths=_paths(files), keys=tuple(key or ["text"]), format=format, on_error=on_error, errors=errors,
        duplicate_keys=duplicate_keys, limit=limit, max_doc_bytes=parse_size(max_doc_bytes), long=long, quiet=quiet,
        force=force,
    )  # fmt: skip
    specials = tuple(special) if special is not None else ("<|endoftext|>", "<|padding|>")
    train_tokenizer(options, stdout, out, vocab_size=vocab_size, specials=specials, min_frequency=min_frequency)


def count(
    files: Files = None,
    tokenizer: TokenizerOption = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="Count the end-of-document ids too.")] = False,
    key: Keys = None,
    format: Format = "auto",
    on_error: OnError = "fail",
    errors: Errors = "strict",
    duplicate_keys: DuplicateKeys = "fail",
    limit: Limit = None,
    workers: Workers = None,
    max_doc_bytes: MaxDocBytes = "1G",
    long: Long = False,
    json: cli.Json = False,
    quiet: cli.Quiet = False,
    *,
    stdout: BinaryIO,
) -> None:
    """Count documents, text bytes and tokens; a token stream on stdin is counted as it is."""
    from neox_tokenize.count import count_inputs
    from neox_tokenize.run import Options

    options = Options(
        paths=_paths(files), tokenizer=None, keys=tuple(key or ["text"]), append_eod=append_eod, format=format,
        on_error=on_error, errors=errors, duplicate_keys=duplicate_keys, limit=limit, workers=workers or _cores(),
        max_doc_bytes=parse_size(max_doc_bytes), long=long, quiet=quiet,
    )  # fmt: skip
    count_inputs(options, stdout, as_json=json, tokenizer=lambda: _tokenizer(tokenizer, quiet))


def parse_size(text: str) -> int:
    """`512M` as bytes; K, M, G are powers of 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"{text!r} is no size; write it like 512M or 2G")
    return int(number) * units.get(unit, 1)


def _refuse_beside_decode(values: Mapping[str, object]) -> None:
    """The stream says how it was made; an option that would say it again is a mistake."""
    for name, parameter in inspect.signature(tokenize).parameters.items():
        if name not in ("files", "decode", "limit", "quiet", "stdout") and values[name] != parameter.default:
            raise UsageError(f"--{name.replace('_', '-')} does nothing with --decode; leave it out")


def _tokenizer(name: str | None, quiet: bool) -> str:
    if name is not None:
        return name
    if from_environment := os.environ.get(DEFAULT_TOKENIZER):
        return from_environment
    if not quiet:
        cli.warn(PROG, f"no --tokenizer and no ${DEFAULT_TOKENIZER}: using the built-in byte tokenizer (258 ids)")
    return "bytes"


def _paths(files: list[Path] | None) -> tuple[str, ...]:
    from neox_tokenize.inputs import expand

    return expand(files or [])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> NoReturn:
    """Run neox-tokenize."""
    cli.run(PROG, tokenize, {"train": train, "count": count})
