# SPDX-License-Identifier: Apache-2.0
"""From blocks of records to batches of tokens: what one worker does with one block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from libneox.stream import NO_LOSS, TokenBatch
from neox_tokenize.blocks import Block
from neox_tokenize.engines import Engine
from neox_tokenize.records import Reader, Reject

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Encoded:
    """A block's tokens.

    Attributes:
        batches: one for each key, of equally many documents.
        rejects: the records that gave no document.
        sizes: bytes of text in each document, over all keys.
    """

    batches: list[TokenBatch]
    rejects: list[Reject]
    sizes: Sequence[int]

    @property
    def text_bytes(self) -> int:
        """Bytes of text in all documents."""
        return sum(self.sizes)

    def first(self, documents: int) -> Encoded:
        """Its first documents, and the rejects that stand before the last of them."""
        batches = [batch.first(documents) for batch in self.batches]
        rejects = [reject for reject in self.rejects if reject.before < documents]
        return Encoded(batches, rejects, self.sizes[:documents])


class Encoder(Protocol):
    """What a worker runs on each block."""

    def __call__(self, block: Block) -> Encoded: ...


@dataclass(frozen=True)
class TextEncoder:
    """Encode the texts of one or several keys.

    Attributes:
        reader: finds the texts.
        engine: encodes them.
        keys: of the stream's columns, in the reader's order.
        eod_id: put behind every document, or None.
        mask_before: ids; the loss is off up to and with their first occurrence in a document. None: no labels.
        clean: applied to every text, for example ftfy.
    """

    reader: Reader
    engine: Engine
    keys: tuple[str, ...]
    eod_id: int | None = None
    mask_before: tuple[int, ...] | None = None
    clean: Callable[[str], str] | None = None

    def __call__(self, block: Block) -> Encoded:
        columns, rejects = self.reader.texts(block)
        batches, sizes = [], [0] * len(columns[0])
        for key, texts in zip(self.keys, columns, strict=True):
            if self.clean is not None:
                texts = [self.clean(text) for text in texts]
            sizes = [size + _utf8_length(text) for size, text in zip(sizes, texts, strict=True)]
            values, lengths = self.engine.encode(texts)
            if self.eod_id is not None:
                values, lengths = append_eod(values, lengths, self.eod_id)
            labels = None if self.mask_before is None else mask_before(values, lengths, self.mask_before)
            batches.append(TokenBatch(values, lengths, labels, key=key))
        return Encoded(batches, rejects, sizes)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def append_eod(values: np.ndarray, lengths: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Put `eod_id` behind every document; values [tokens] and int64 lengths [documents] of the result."""
    import numpy as np

    lengths = lengths + 1
    result = np.full(len(values) + len(lengths), eod_id, dtype=values.dtype)
    is_text = np.ones(len(result), dtype=bool)
    is_text[np.cumsum(lengths) - 1] = False
    result[is_text] = values
    return result, lengths


def mask_before(values: np.ndarray, lengths: np.ndarray, pattern: tuple[int, ...]) -> np.ndarray:
    """Labels int32 [tokens]: NO_LOSS up to and with the first occurrence of `pattern` in each document.

    A document without the pattern keeps all its labels (GPT-NeoX, preprocess_data_with_mask.py).
    """
    import numpy as np

    labels = values.astype(np.int32)
    starts = len(values) - len(pattern) + 1
    found = np.ones(max(starts, 0), dtype=bool)
    for i, token in enumerate(pattern):
        found &= values[i : i + len(found)] == token
    positions = np.flatnonzero(found)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    first = np.searchsorted(positions, begins)
    for document in np.flatnonzero(first < len(positions)):
        stop = positions[first[document]] + len(pattern)
        if stop <= ends[document]:
            labels[begins[document] : stop] = NO_LOSS
    return labels


def in_order(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Apply `function` to every item on `workers` threads; results come in the order of the items.

    At most `workers` + 1 items are in work or waiting, so a slow consumer slows the reader down. Threads, since the
    engines work outside Python's lock; a fork behind their own threads would hang.
    """
    from collections import deque

    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    pending: deque = deque()  # type: ignore[type-arg]
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
