# SPDX-License-Identifier: Apache-2.0
"""The engines that turn texts into ids: the reference, and faster ones that must give the same ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from libneox.tokenizer import JsonTokenizer, Tokenizer, byte_tokenizer

if TYPE_CHECKING:
    import numpy as np


class Engine(Protocol):
    """Encodes batches of texts; safe to call from several threads, each call runs on the thread that makes it."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids of all texts, one text after another, of the tokenizer's dtype; and int64 [texts] lengths."""
        ...


class ReferenceEngine:
    """The library that defines the tokenizer: `tokenizers`, sentencepiece or tiktoken."""

    def __init__(self, tokenizer: Tokenizer, dtype: str, *, allow_special: bool):
        self._tokenizer, self._dtype, self._allow_special = tokenizer, dtype, allow_special
        self.name = "tokenizers" if isinstance(tokenizer, JsonTokenizer) else tokenizer.kind

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        if isinstance(self._tokenizer, JsonTokenizer):
            backend = self._tokenizer.backend(allow_special=self._allow_special)
            # straight to the final type, encoding by encoding: Python lists of a whole batch would be 20 times as large
            parts = [np.array(e.ids, dtype=self._dtype) for e in backend.encode_batch_fast(list(texts))]
        else:
            encoded = self._tokenizer.encode_batch(texts, allow_special=self._allow_special)
            parts = [ids.astype(self._dtype) for ids in encoded]
        lengths = np.fromiter(map(len, parts), dtype=np.int64, count=len(parts))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self._dtype), lengths


class ByteEngine:
    """The built-in byte tokenizer without a detour: id = 2 + byte."""

    name = "bytes"

    def __init__(self, dtype: str):
        self._dtype = dtype

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(self._dtype) + np.array(2, self._dtype), lengths


def is_byte_tokenizer(tokenizer: Tokenizer) -> bool:
    """Whether this is the built-in tokenizer, wherever it was loaded from."""
    return len(tokenizer.data) < 1 << 16 and tokenizer.fingerprint == byte_tokenizer().fingerprint
