# SPDX-License-Identifier: Apache-2.0
"""Training a byte-level BPE tokenizer on a stream of texts."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from libneox.cli import warn
from libneox.errors import INTERRUPTED, DataError, UsageError
from libneox.files import atomic_write, check_output, human_bytes
from libneox.progress import Progress
from libneox.tokenizer import JsonTokenizer
from neox_tokenize.rejects import Rejects, open_rejects
from neox_tokenize.run import PROG, Options

BYTES = 256


def train_tokenizer(
    options: Options, stdout: BinaryIO, out: Path, *, vocab_size: int, specials: tuple[str, ...], min_frequency: int
) -> None:
    """Train GPT-NeoX's kind of tokenizer: NFC, GPT-2's split, bytes, merges. The same input gives the same file.

    Texts are streamed; what is held is the table of distinct words.

    Raises:
        UsageError: the vocabulary has no room for the bytes and the special tokens.
        DataError: there is no text to train on.
    """
    if vocab_size < BYTES + len(specials):
        raise UsageError(f"--vocab-size {vocab_size}: {BYTES} bytes and {len(specials)} special tokens need more")
    to_stdout = str(out) == "-"
    if not to_stdout:
        check_output(out, force=options.force)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = _Seen()
    with _interruptible() as pool, open_rejects(PROG, options.on_error, force=options.force) as rejects:
        pool.submit(backend.train_from_iterator, _texts(options, rejects, seen), trainer).result()
    if seen.error is not None:
        raise seen.error  # tokenizers would have wrapped it
    if not seen.documents:
        raise DataError("no text to train on in the input")
    data = backend.to_str(pretty=True).encode()
    size = JsonTokenizer(data, "the new tokenizer").vocab_size
    if to_stdout:
        stdout.write(data + b"\n")
    else:
        with atomic_write(out) as file:
            file.write(data)
    if not options.quiet:
        note = "" if size == vocab_size else f" (not {vocab_size}: the texts hold no more pairs to merge)"
        warn(PROG, f"{out}: {size} ids{note}, from {seen.documents:,} documents, {human_bytes(seen.size)} of text")


@contextlib.contextmanager
def _interruptible() -> Iterator[ThreadPoolExecutor]:
    """A thread for the library, which looks at no signal until it is done, so that this one can.

    Ended by a signal, the process stops at once: Python cannot be taken down while the library may call into it.
    """
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    except BaseException as error:
        if isinstance(error, Exception):
            raise
        os._exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 128 + signal.SIGTERM)


class _Seen:
    """What went past the trainer, and the error that stopped it."""

    documents = 0
    size = 0
    error: BaseException | None = None


def _texts(options: Options, rejects: Rejects, seen: _Seen) -> Iterator[list[str]]:
    reader = options.reader()
    with Progress(PROG, "documents", quiet=options.quiet) as progress:
        try:
            for block in options.inputs().blocks():
                columns, rejected = reader.texts(block)
                if options.limit is not None:
                    left = options.limit - seen.documents
                    columns = [column[:left] for column in columns]
                    rejected = [reject for reject in rejected if reject.before < left]
                rejects.take(rejected)
                seen.documents += len(columns[0])
                texts = [text for column in columns for text in column]
                seen.size += sum(map(len, texts))
                progress.update(len(columns[0]))
                yield texts
                if seen.documents == options.limit:
                    return
        except BaseException as error:  # kept for the caller: on its way through Rust it would lose its type
            seen.error = error
