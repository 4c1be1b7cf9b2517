# SPDX-License-Identifier: Apache-2.0
"""One run of neox-tokenize: options to a token stream."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from libneox.cli import warn
from libneox.errors import DataError, UsageError
from libneox.files import atomic_write, check_output, human_bytes
from libneox.lookahead import Lookahead
from libneox.progress import Progress
from libneox.stream import StreamHeader, StreamWriter
from libneox.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer
from neox_tokenize.blocks import Limits
from neox_tokenize.chat import ChatEncoder, ChatRules, chat_encoder
from neox_tokenize.encode import Encoded, Encoder, TextEncoder, in_order
from neox_tokenize.engines import ByteEngine, Engine, ReferenceEngine, is_byte_tokenizer
from neox_tokenize.inputs import Inputs
from neox_tokenize.records import Reader, Rules
from neox_tokenize.rejects import Rejects, open_rejects
from neox_tokenize.sums import Sums

PROG = "neox-tokenize"


@dataclass(frozen=True)
class Options:
    """The command line, checked one by one but not against each other; the names are those of the options."""

    paths: tuple[str, ...]
    tokenizer: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    eod: str | None = None
    format: str = "auto"
    on_error: str = "fail"
    errors: str = "strict"
    duplicate_keys: str = "fail"
    limit: int | None = None
    workers: int = 1
    max_doc_bytes: int = 1 << 30
    long: bool = False
    verify_hash: str | None = None
    allow_special: bool = False
    mask_before: str | None = None
    ftfy: bool = False
    dtype: str | None = None
    engine: str = "auto"
    compat: str | None = None
    fail_on_empty: bool = False
    chat: bool = False
    chat_template: str | None = None
    chat_rules: ChatRules = field(default_factory=ChatRules)
    quiet: bool = False
    force: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "errors": ("strict", "replace"),
            "duplicate_keys": ("fail", "last"),
            "compat": (None, "neox"),
            "dtype": (None, "uint16", "int32"),
            "engine": ("auto", "tokenizers", "gigatoken"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                shown = ", ".join(filter(None, values))
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: one of {shown}")
        if self.compat == "neox" and self.format != "auto":
            raise UsageError("--compat neox tells a format by the file's suffix; drop --format")
        if len(set(self.keys)) != len(self.keys):
            raise UsageError("--key names the same key twice")

    @property
    def special_as_ids(self) -> bool:
        """Whether special tokens written in a text become their ids."""
        return self.allow_special or self.compat == "neox"

    def inputs(self) -> Inputs:
        """Where the records come from."""
        limits = Limits(self.max_doc_bytes, self.long)
        sums = Sums(self.verify_hash) if self.verify_hash is not None else None
        reward = (self.chat_rules.reward_key,) if self.chat_rules.reward_key else ()
        return Inputs(
            self.paths, (*self.keys, *reward), self.format, limits, sums, neox=self.compat == "neox", prog=PROG
        )

    def reader(self) -> Reader:
        """How records become texts."""
        neox = self.compat == "neox"
        return Reader(Rules(self.keys, self.errors == "replace", self.duplicate_keys == "last", neox))


def tokenize_inputs(options: Options, stdout: BinaryIO, out: Path | None) -> None:
    """Tokenize everything into a token stream on stdout or in a file.

    Raises:
        UsageError: options that contradict each other or the tokenizer.
        DataError: a record or a file cannot be used; nothing is finished then, the stream has no trailer.
    """
    if out is not None:
        check_output(out, force=options.force)
    tokenizer = load_tokenizer(options.tokenizer or "bytes")
    eod_id = end_of_document(tokenizer, options)
    dtype = token_dtype(tokenizer, options)
    columns = options.keys if len(options.keys) > 1 else ("",)
    encoder, engine = _encoder(tokenizer, dtype, eod_id, columns, options)
    header = StreamHeader(
        dtype=dtype,
        tokenizer_kind=tokenizer.kind,
        tokenizer_data=tokenizer.data,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod_id=encoder.eos_id if isinstance(encoder, ChatEncoder) else eod_id,
        keys=columns,
        labels=options.chat or options.mask_before is not None,
        rewards=options.chat_rules.reward_key is not None,
        info={"command": shlex.join([PROG, *sys.argv[1:]]), "engine": engine, "append_eod": options.append_eod},
    )
    with _sink(stdout, out) as sink, open_rejects(PROG, options.on_error, force=options.force) as rejects:
        _write(options, header, encoder, sink, rejects)


def _encoder(
    tokenizer: Tokenizer, dtype: str, eod_id: int | None, columns: tuple[str, ...], options: Options
) -> tuple[Encoder, str]:
    """What the workers run, and the name of its engine."""
    if options.chat:
        if options.mask_before or options.ftfy or options.append_eod:
            raise UsageError("--chat sets labels and the end token itself; drop --mask-before, --ftfy, --append-eod")
        if options.allow_special or options.engine == "gigatoken":
            raise UsageError(
                "--chat reads special tokens out of the rendered text, by tokenizers; drop the other options"
            )
        rules = replace(options.chat_rules, neox=options.compat == "neox")
        source = options.tokenizer or "bytes"
        end = eod_id if options.eod is not None else None
        chat = chat_encoder(tokenizer, source, options.reader(), rules, columns, options.chat_template, end)
        return chat, "tokenizers"
    if options.chat_rules != ChatRules() or options.chat_template:
        raise UsageError("the options for conversations and rewards need --chat")
    engine = choose_engine(tokenizer, dtype, options)
    encoder = TextEncoder(
        options.reader(),
        engine,
        columns,
        eod_id if options.append_eod else None,
        mask_before=mask_pattern(tokenizer, options),
        clean=_cleaner() if options.ftfy else None,
    )
    return encoder, engine.name


def _write(options: Options, header: StreamHeader, encoder: Encoder, sink: BinaryIO, rejects: Rejects) -> None:
    progress = Progress(PROG, "documents", quiet=options.quiet, live=options.live)
    text_bytes = 0
    with progress, StreamWriter(sink, header) as writer:
        for encoded in encoded_blocks(options, encoder):
            rejects.take(encoded.rejects)
            text_bytes += encoded.text_bytes
            if len(encoded.batches[0]):
                writer.write(*encoded.batches)
            progress.update(len(encoded.batches[0]), f"{writer.tokens:,} tokens")
        if not writer.documents:
            if options.fail_on_empty:
                raise DataError("no document in the input; --fail-on-empty makes this an error")
            warn(PROG, "no document in the input; the token stream is empty")
        writer.finish(rejects.counts)
    if not options.quiet:
        rate = human_bytes(text_bytes / max(progress.seconds, 1e-9))
        left_out = rejects.summary()
        warn(
            PROG,
            f"{writer.documents:,} documents, {writer.tokens:,} tokens, {human_bytes(text_bytes)} of text in "
            f"{progress.seconds:.1f} s ({rate}/s, engine {header.info['engine']})"
            + (f"; {left_out}" if left_out else ""),
        )


def encoded_blocks(options: Options, encoder: Encoder, source: Lookahead | None = None) -> Iterator[Encoded]:
    """The input, encoded, in order, cut off behind `--limit` documents.

    Args:
        source: the opened only input, if it had to be looked into.
    """
    left = options.limit
    if left == 0:
        return
    for encoded in in_order(encoder, options.inputs().blocks(source), options.workers):
        count = len(encoded.batches[0])
        if left is not None and count >= left:
            yield encoded.first(left)
            return
        if left is not None:
            left -= count
        yield encoded


def end_of_document(tokenizer: Tokenizer, options: Options) -> int | None:
    """The end-of-document id: `--eod`, or the tokenizer's own."""
    if options.eod is None:
        if options.append_eod and tokenizer.eod_id is None:
            raise UsageError(f"{tokenizer.name}: no end-of-document token of a usual name; --eod names it")
        return tokenizer.eod_id
    found = tokenizer.token_id(options.eod)
    if found is None and options.eod.isdecimal():
        found = int(options.eod)
    if found is None or found >= tokenizer.vocab_size:
        raise UsageError(f"--eod {options.eod}: not a token or id of {tokenizer.name}")
    return found


def token_dtype(tokenizer: Tokenizer, options: Options) -> str:
    """The type of the ids: labels hold -100 and need int32, otherwise by the vocabulary."""
    signed = options.chat or options.mask_before is not None
    if options.dtype == "uint16" and (signed or tokenizer.vocab_size > 65536):
        reason = "labels hold -100" if signed else f"the vocabulary has {tokenizer.vocab_size} ids"
        raise UsageError(f"--dtype uint16 is too small: {reason}; leave it out")
    return options.dtype or ("int32" if signed else tokenizer.dtype)


def choose_engine(tokenizer: Tokenizer, dtype: str, options: Options) -> Engine:
    """The engine that encodes: the fastest that gives the reference's ids; `--engine` insists on one."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each of our threads encodes a block of its own
    allow_special = options.special_as_ids
    if options.engine == "auto" and is_byte_tokenizer(tokenizer) and not allow_special:
        return ByteEngine(dtype)
    if options.engine != "tokenizers" and isinstance(tokenizer, JsonTokenizer):
        from neox_tokenize.gigatoken_engine import GigatokenEngine, Unsuitable

        try:
            return GigatokenEngine(tokenizer, dtype, workers=options.workers, allow_special=allow_special)
        except Unsuitable as reason:
            if options.engine == "gigatoken":
                raise UsageError(f"--engine gigatoken: {tokenizer.name}: {reason}") from reason
            if not options.quiet:
                warn(PROG, f"{tokenizer.name}: the fast engine is not used: {reason}")
    elif options.engine == "gigatoken":
        raise UsageError(f"--engine gigatoken: {tokenizer.name} is no tokenizer.json")
    return ReferenceEngine(tokenizer, dtype, allow_special=allow_special)


def mask_pattern(tokenizer: Tokenizer, options: Options) -> tuple[int, ...] | None:
    """`--mask-before` as ids: numbers with commas, or a text to be encoded."""
    text = options.mask_before
    if text is None:
        return None
    if all(part.strip().isdecimal() for part in text.split(",")):
        ids = tuple(int(part) for part in text.split(","))
        if max(ids) >= tokenizer.vocab_size:
            raise UsageError(
                f"--mask-before {text}: {max(ids)} is not below the vocabulary size {tokenizer.vocab_size}"
            )
        return ids
    try:  # escapes such as \n are meant; other characters, whatever their script, stay what they are
        plain = text.encode("latin-1", errors="backslashreplace").decode("unicode_escape")
        plain.encode()
    except UnicodeError as error:
        raise UsageError(f"--mask-before {text}: not a text with valid escapes ({error})") from error
    encoded = tokenizer.encode(plain, allow_special=options.special_as_ids, add_special_tokens=False)
    if not encoded:
        raise UsageError("--mask-before encodes to nothing")
    return tuple(encoded)


def _cleaner():  # type: ignore[no-untyped-def]
    try:
        import ftfy
    except ImportError as error:
        raise UsageError("--ftfy needs the ftfy library; pip install ftfy") from error
    return ftfy.fix_text


@contextlib.contextmanager
def _sink(stdout: BinaryIO, out: Path | None) -> Iterator[BinaryIO]:
    if out is None:
        yield stdout
    else:
        with atomic_write(out) as file:
            yield file
