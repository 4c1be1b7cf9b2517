# SPDX-License-Identifier: Apache-2.0
"""`neox-eval perplexity`: how well a model predicts texts, per token, byte and word.

Every document is scored by itself, its first token from the end-of-text token, in windows as long as the model reads;
each token is predicted exactly once. Words are what white space separates, as in the harness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from libneox.errors import DataError, InputMissing, UsageError
from libneox.progress import Progress

if TYPE_CHECKING:
    from neox_eval.lm import NeoxLM
    from neox_eval.request import ModelRequest

DOCUMENTS_AT_ONCE = 512


class Document(NamedTuple):
    """A text as ids, and how many bytes and words it is."""

    ids: list[int]
    bytes: int
    words: int


@dataclasses.dataclass
class Totals:
    """Sums over documents."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    nats: float = 0.0  # minus the log-probability

    def add(self, other: Totals) -> None:
        """Add another part of the same data."""
        for name, value in dataclasses.asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float | int | None]:
        """The sums and what they come to; null where there is nothing to divide by, or the number is too large."""
        per_token, per_byte, per_word = (
            self.nats / count if count else None for count in (self.tokens, self.bytes, self.words)
        )
        return {
            **dataclasses.asdict(self),
            "loss": per_token,
            "token_perplexity": _exp(per_token),
            "bits_per_byte": None if per_byte is None else per_byte / math.log(2),
            "byte_perplexity": _exp(per_byte),
            "word_perplexity": _exp(per_word),
        }


def _exp(x: float | None) -> float | None:
    return None if x is None or x > 700 else math.exp(x)


def measure_all(
    checkpoint: str,
    data: Sequence[str],
    stdout: BinaryIO,
    *,
    model: ModelRequest,
    key: str,
    limit: int | None,
    context: int,
    quiet: bool,
) -> None:
    """Measure each of `data` and write a line of JSON for it.

    Raises:
        InputMissing: one of them is neither a pair nor a file; found before the model is loaded.
        UsageError: a pair was made with another tokenizer than the checkpoint's.
    """
    for source in data:
        kind_of(source)
    from neox_eval.lm import NeoxLM
    from neox_eval.ranks import Ranks

    with contextlib.closing(Ranks(model.tensor_parallel)) as ranks:
        if "-" in data and ranks.tensor_parallel > 1:
            raise UsageError("-: stdin reaches one process only; name a file that all of them can read")
        lm = NeoxLM(
            checkpoint,
            tokenizer=model.tokenizer,
            device=model.device,
            dtype=model.dtype,
            batch_size=model.batch_size,
            max_length=model.max_length,
            ranks=ranks,
            quiet=True,
        )
        if context > lm.max_length:
            raise UsageError(f"--context {context} is more than the {lm.max_length} tokens that are read at once")
        for source in data:
            documents = pair_documents(source, lm) if kind_of(source) == "pair" else jsonl_documents(source, key, lm)
            totals = measure(lm, itertools.islice(documents, limit), context=context, quiet=quiet)
            if ranks.is_first:
                line = {"data": source, "checkpoint": checkpoint, **totals.figures()}
                line |= {"max_length": lm.max_length, "context": context}
                stdout.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n")
                stdout.flush()


def kind_of(source: str) -> str:
    """`pair` for a PREFIX of .bin/.idx (or one of the two files), `jsonl` for another file or `-`."""
    from libneox.data.mmap import pair_paths, strip_suffix

    if source != "-" and pair_paths(strip_suffix(source))[0].is_file():
        return "pair"
    if source == "-" or Path(source).is_file():
        return "jsonl"
    raise InputMissing(f"{source}: neither a file nor the prefix of a .bin/.idx pair")


def measure(lm: NeoxLM, documents: Iterator[Document], *, context: int, quiet: bool) -> Totals:
    """Score documents, a few hundred at a time; with several ranks each takes its share and all get the sum."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    from neox_eval.scoring import score

    mine = itertools.islice(documents, lm.rank, None, lm.world_size)
    totals = Totals()
    with Progress("neox-eval", "documents", quiet=quiet or not lm.ranks.is_first) as progress:
        while some := list(itertools.islice(mine, DOCUMENTS_AT_ONCE)):
            windows = [
                make_disjoint_window(window)
                for document in some
                for window in get_rolling_token_windows(document.ids, lm.prefix_token_id, lm.max_length, context)
            ]
            for batch in score(lm.model, windows, max_length=lm.max_length, limits=lm.limits):
                totals.nats -= sum(result.logprob for _, result in batch)
            totals.documents += len(some)
            totals.tokens += sum(len(document.ids) for document in some)
            totals.bytes += sum(document.bytes for document in some)
            totals.words += sum(document.words for document in some)
            progress.update(len(some))
    everything = Totals()
    for part in lm.ranks.gather(dataclasses.asdict(totals)):
        everything.add(Totals(**part))
    return everything


def pair_documents(prefix: str, lm: NeoxLM) -> Iterator[Document]:
    """The sequences of a pair; bytes and words are those of their text without special tokens.

    Raises:
        UsageError: another tokenizer made the ids.
        DataError: an id the model does not have.
    """
    from libneox.data.manifest import read_manifest
    from libneox.data.mmap import MMapDataset, strip_suffix

    manifest, ours = read_manifest(strip_suffix(prefix)), lm.tokenizer.base
    if manifest and manifest.tokenizer and manifest.tokenizer.sha256 != ours.fingerprint:
        raise UsageError(
            f"{prefix}: made with tokenizer {manifest.tokenizer.sha256[:12]}, the checkpoint has "
            f"{ours.fingerprint[:12]}; tokenize the text again with the checkpoint's"
        )
    with MMapDataset(prefix) as dataset:
        for number in range(len(dataset)):
            ids = dataset.get(number).tolist()
            if ids and max(ids) >= lm.model.config.padded_vocab_size:
                raise DataError(f"{prefix}: sequence {number} holds id {max(ids)}, which the model does not have")
            yield _document(ids, lm.tokenizer.decode(ids))


def jsonl_documents(path: str, key: str, lm: NeoxLM) -> Iterator[Document]:
    """The texts of a JSONL file, compressed or not; `-` is stdin.

    Raises:
        DataError: a line that is no object with a text under `key`; named by its number.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)
            for part in [key] if key in text else key.split("."):
                text = text[part]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: no text under {key!r} ({error})") from error
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: {key!r} is a {type(text).__name__}, not a text")
        try:
            ids = lm.tok_encode(text)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        yield _document(ids, text)


def _document(ids: list[int], text: str) -> Document:
    return Document(ids, len(text.encode("utf-8", "replace")), len(re.split(r"\s+", text)))


def _lines(path: str) -> Iterator[bytes]:
    from libneox.decompress import decompressed
    from libneox.files import CHUNK_BYTES, open_input
    from libneox.lookahead import Lookahead

    with open_input(path) as file:
        source = decompressed(Lookahead(file), path)
        rest = b""
        while chunk := source.read1(CHUNK_BYTES):
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            yield from lines
        if rest:
            yield rest
