# SPDX-License-Identifier: Apache-2.0
"""Counting: how many documents, bytes and tokens an input has."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from libneox.files import open_input
from libneox.lookahead import Lookahead
from libneox.progress import Progress
from libneox.stream import CONTINUATION, StreamReader
from libneox.tokenizer import load_tokenizer
from neox_tokenize.encode import TextEncoder
from neox_tokenize.rejects import open_rejects
from neox_tokenize.run import PROG, Options, choose_engine, encoded_blocks, end_of_document


def count_inputs(
    options: Options,
    stdout: BinaryIO,
    *,
    as_json: bool,
    tokenizer: Callable[[], str],
    on_stream: Callable[[], None] = lambda: None,
) -> None:
    """Print the counts of texts or, given a token stream, of its tokens.

    Args:
        tokenizer: names the tokenizer; asked only where there are texts to encode.
        on_stream: called if the input is a token stream, before it is counted.
    """
    paths = options.paths or ("-",)
    if len(paths) == 1 and not Path(paths[0]).is_dir():
        with contextlib.closing(open_input(paths[0])) as file:
            source = Lookahead(file)
            if source.peek(4) == CONTINUATION:
                on_stream()
                counts = _of_stream(source, paths[0])
            else:
                counts = _of_texts(replace(options, tokenizer=tokenizer()), source)
    else:
        counts = _of_texts(replace(options, tokenizer=tokenizer()), None)
    if as_json:
        stdout.write(json.dumps(counts).encode() + b"\n")
    else:
        for name, value in counts.items():
            shown = ", ".join(f"{k} {v:,}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
            if shown:
                stdout.write(f"{name}\t{shown}\n".encode())


def _of_stream(source: Lookahead, name: str) -> dict[str, Any]:
    reader = StreamReader(source, "stdin" if name == "-" else name)  # type: ignore[arg-type]
    longest = max((int(batch.lengths.max()) for batch in reader if len(batch)), default=0)
    return {
        "documents": reader.documents,
        "tokens": reader.tokens,
        "longest_document": longest,
        "skipped": dict(reader.rejects),
    }


def _of_texts(options: Options, source: Lookahead | None) -> dict[str, Any]:
    tokenizer = load_tokenizer(options.tokenizer or "bytes")
    engine = choose_engine(tokenizer, "int32", options)
    eod_id = end_of_document(tokenizer, options) if options.append_eod else None
    encoder = TextEncoder(options.reader(), engine, options.keys, eod_id)
    documents = text_bytes = longest = 0
    tokens = dict.fromkeys(options.keys, 0)
    progress = Progress(PROG, "documents", quiet=options.quiet)
    with open_rejects(PROG, options.on_error, force=False) as rejects, progress:
        for encoded in encoded_blocks(options, encoder, source):
            rejects.take(encoded.rejects)
            documents += len(encoded.batches[0])
            text_bytes += encoded.text_bytes
            for batch in encoded.batches:
                tokens[batch.key] += len(batch.values)
                longest = max(longest, int(batch.lengths.max(initial=0)))
            progress.update(len(encoded.batches[0]))
    counts = {"documents": documents, "text_bytes": text_bytes, "tokens": sum(tokens.values())}
    if len(tokens) > 1:
        counts["tokens_by_key"] = tokens  # type: ignore[assignment]
    return {**counts, "longest_document": longest, "skipped": dict(rejects.counts)}
