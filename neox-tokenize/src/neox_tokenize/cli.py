# SPDX-License-Identifier: Apache-2.0
"""The command line of neox-tokenize."""

from __future__ import annotations

import inspect
import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, NoReturn

import typer

from libneox import cli
from libneox.errors import UsageError

if TYPE_CHECKING:
    from neox_tokenize.chat import ChatRules
    from neox_tokenize.run import Options

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
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-j", min=1, help="Threads; the output is the same for any number. Default: one a core."),
]


@dataclass(frozen=True)
class Reading:
    """Options of all that reads texts."""

    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", "-k", metavar="KEY",
            help="JSON key of the text; a.b goes into objects. Repeatable: each is tokenized to a column of its own. "
            "Default: text, with --chat messages.",
        ),
    ] = None  # fmt: skip
    format: Annotated[
        str, typer.Option(help="auto, jsonl, json (one array), text (a file is a document), lines (a line is one).")
    ] = "auto"
    on_error: Annotated[
        str,
        typer.Option(metavar="fail|skip|quarantine=FILE", help="What to do with a record that gives no document."),
    ] = "fail"
    errors: Annotated[
        str, typer.Option(metavar="strict|replace", help="Invalid Unicode is an error, or becomes U+FFFD.")
    ] = "strict"
    duplicate_keys: Annotated[str, typer.Option(metavar="fail|last", help="A key given twice in a record.")] = "fail"
    limit: Annotated[int | None, typer.Option(min=0, help="Stop after this many documents.")] = None
    max_doc_bytes: Annotated[str, typer.Option(help="Largest document accepted, such as 512M or 2G.")] = "1G"
    long: Annotated[bool, typer.Option("--long", help="Accept zstd windows up to 2 GiB instead of 128 MiB.")] = False
    quiet: cli.Quiet = False

    def options(self, files: list[Path] | None, default_key: str = "text", **more: Any) -> Options:
        """These with others, checked."""
        from neox_tokenize.inputs import expand
        from neox_tokenize.run import Options

        values = vars(self) | {"max_doc_bytes": parse_size(self.max_doc_bytes)}
        keys = tuple(values.pop("key") or [default_key])
        return Options(paths=expand(files or []), keys=keys, **values, **more)


@dataclass(frozen=True)
class Conversations:
    """Options of conversations and rewards."""

    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The values are lists of messages, made into tokens and labels by the chat template."
        ),
    ] = False
    chat_template: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A Jinja template. Default: that of the tokenizer's tokenizer_config.json."),
    ] = None
    generation_role: Annotated[str, typer.Option(help="The loss is on what this role says.")] = "assistant"
    only_last: Annotated[bool, typer.Option("--only-last", help="The loss is on the last turn alone.")] = False
    no_mask: Annotated[bool, typer.Option("--no-mask", help="The loss is on everything.")] = False
    for_rm: Annotated[
        bool, typer.Option("--for-rm", help="For reward models: two end tokens, the loss on the second alone.")
    ] = False
    reward_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="A number of each record, written beside its tokens.")
    ] = None
    binary_reward: Annotated[bool, typer.Option("--binary-reward", help="The reward is true or false: 1 or -1.")] = (
        False
    )

    def rules(self) -> ChatRules:
        """What the loss is on, and where rewards are."""
        from neox_tokenize.chat import ChatRules

        if self.binary_reward and self.reward_key is None:
            raise UsageError("--binary-reward needs --reward-key")
        if self.only_last + self.no_mask + self.for_rm > 1:
            raise UsageError("--only-last, --no-mask and --for-rm each say where the loss is; give one of them")
        return ChatRules(
            self.generation_role, self.only_last, not self.no_mask, self.for_rm, self.reward_key, self.binary_reward
        )


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
    ] = None,
    append_eod: Annotated[
        bool, typer.Option("--append-eod", help="End every document with the tokenizer's end-of-document id.")
    ] = False,
    eod: Annotated[
        str | None, typer.Option(metavar="TOKEN|ID", help="The end-of-document token, where its name is unusual.")
    ] = None,
    workers: Workers = None,
    verify_hash: Annotated[
        str | None,
        typer.Option(
            metavar="SHA256SUMS", help="The input files must have the hashes of this list, as sha256sum writes it."
        ),
    ] = None,
    allow_special: Annotated[
        bool,
        typer.Option(
            "--allow-special", help="Special tokens written in a text become their ids; default: ordinary text."
        ),
    ] = False,
    mask_before: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Labels without loss up to and with the first occurrence of these ids (27,187) or this text (':\\n').",
        ),
    ] = None,
    ftfy: Annotated[bool, typer.Option("--ftfy", help="Repair broken encodings with ftfy first.")] = False,
    dtype: Annotated[
        str | None, typer.Option(metavar="uint16|int32", help="Type of the ids. Default: by the vocabulary.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="auto|tokenizers|gigatoken",
            help="auto: the fastest that gives exactly the ids of the tokenizers library.",
        ),
    ] = "auto",
    compat: Annotated[
        str | None,
        typer.Option(metavar="neox", help="Read and encode exactly as GPT-NeoX's preprocess_data.py did."),
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="The other way: a token stream in, JSONL out.")] = False,
    fail_on_empty: Annotated[
        bool, typer.Option("--fail-on-empty", help="No document at all is an error (65), not a warning.")
    ] = False,
    force: cli.Force = False,
    *,
    conversations: Conversations,
    reading: Reading,
    stdout: BinaryIO,
) -> None:
    """Text in, tokens out: JSONL, archives or plain text to a token stream on stdout, for neox-shard."""
    if decode:
        _refuse_others(tokenize, locals(), ("files", "decode", "limit", "quiet", "stdout"), "with --decode")
        from neox_tokenize.decode import decode_stream
        from neox_tokenize.inputs import expand

        decode_stream(expand(files or []), stdout, limit=reading.limit)
        return
    if out is None:
        cli.refuse_terminal(stdout, "a token stream")
    from neox_tokenize.run import tokenize_inputs

    rules, name = conversations.rules(), _tokenizer(tokenizer, reading.quiet)
    options = reading.options(
        files, "messages" if conversations.chat else "text", tokenizer=name, append_eod=append_eod, eod=eod,
        workers=workers or _cores(), verify_hash=verify_hash, allow_special=allow_special, mask_before=mask_before,
        ftfy=ftfy, dtype=dtype, engine=engine, compat=compat, fail_on_empty=fail_on_empty, chat=conversations.chat,
        chat_template=conversations.chat_template, chat_rules=rules, force=force, live=out is not None,
    )  # fmt: skip
    tokenize_inputs(options, stdout, out)


def train(
    files: Files = None,
    vocab_size: Annotated[int, typer.Option(min=256, help="Ids of the finished tokenizer, specials included.")] = 32000,
    special: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="Special tokens, from id 0 on. Default: <|endoftext|> <|padding|>."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="Where the tokenizer.json goes; - is stdout.")
    ] = Path("tokenizer.json"),
    min_frequency: Annotated[int, typer.Option(min=0, help="Pairs seen less often are not merged.")] = 2,
    force: cli.Force = False,
    *,
    reading: Reading,
    stdout: BinaryIO,
) -> None:
    """Train a byte-level BPE tokenizer on the texts and write its tokenizer.json."""
    from neox_tokenize.train import train_tokenizer

    options = reading.options(files, force=force)
    specials = tuple(special) if special is not None else ("<|endoftext|>", "<|padding|>")
    train_tokenizer(options, stdout, out, vocab_size=vocab_size, specials=specials, min_frequency=min_frequency)


def count(
    files: Files = None,
    tokenizer: TokenizerOption = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="Count the end-of-document ids too.")] = False,
    workers: Workers = None,
    json: cli.Json = False,
    *,
    reading: Reading,
    stdout: BinaryIO,
) -> None:
    """Count documents, text bytes and tokens; a token stream on stdin is counted as it is."""
    values = locals()
    from neox_tokenize.count import count_inputs

    options = reading.options(files, append_eod=append_eod, workers=workers or _cores())
    count_inputs(
        options,
        stdout,
        as_json=json,
        tokenizer=lambda: _tokenizer(tokenizer, reading.quiet),
        on_stream=lambda: _refuse_others(count, values, ("files", "json", "quiet", "stdout"), "with a token stream"),
    )


def parse_size(text: str) -> int:
    """`512M` as bytes; K, M, G are powers of 1024."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    if not number.isdecimal() or int(number) == 0:
        raise UsageError(f"{text!r} is no size; write it like 512M or 2G")
    return int(number) * units.get(unit, 1)


def _refuse_others(command: cli.Command, values: Mapping[str, Any], allowed: Container[str], where: str) -> None:
    """A token stream says how it was made; an option that would say it again is a mistake."""
    groups = [vars(value) for value in values.values() if is_dataclass(value)]
    given = {name: value for group in (values, *groups) for name, value in group.items()}
    for name, parameter in inspect.signature(cli.flat(command)).parameters.items():
        if name not in allowed and given[name] != parameter.default:
            raise UsageError(f"--{name.replace('_', '-')} does nothing {where}; leave it out")


def _tokenizer(name: str | None, quiet: bool) -> str:
    if name is not None:
        return name
    if from_environment := os.environ.get(DEFAULT_TOKENIZER):
        return from_environment
    if not quiet:
        cli.warn(PROG, f"no --tokenizer and no ${DEFAULT_TOKENIZER}: using the built-in byte tokenizer (258 ids)")
    return "bytes"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> NoReturn:
    """Run neox-tokenize."""
    cli.run(PROG, tokenize, {"train": train, "count": count})
