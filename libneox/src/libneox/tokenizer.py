# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading, fingerprint, encoding and decoding. One class, whatever the file behind it.

A tokenizer is a kind and the bytes of a file; both travel with the data (token stream, shard, checkpoint), so that
nobody has to name the tokenizer again. The fingerprint is the sha256 of those bytes.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import tokenizers

BYTES = "bytes"  # the name of the built-in tokenizer
# What ends a document, by the names of the field; GPT-NeoX knows only the first.
EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>")
PAD_TOKENS = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
UINT16_BELOW = 65500  # vocabularies below it are stored as uint16: GPT-NeoX and Megatron, best_fitting_dtype


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer from a file, from a directory that holds one, or the built-in one.

    Args:
        source: a `tokenizer.json`, a GPT-2 `vocab.json` with its `merges.txt` beside it, a sentencepiece `.model`,
            a `.tiktoken` file, or a directory with one of these (a Hugging Face model, a checkpoint step, a run).
            Without a file: `bytes` (the built-in byte-level tokenizer), `charlevel`, `tiktoken:NAME`.
    Raises:
        InputMissing: nothing there.
        DataError: the file is no tokenizer.
    """
    from libneox import tokenizer_files

    if str(source) == BYTES:
        return byte_tokenizer()
    return Tokenizer.from_bytes(*tokenizer_files.read(source), name=str(source))


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        kind: "tokenizer.json", "sentencepiece", "tiktoken" or "charlevel"; names the reader of `data`.
        data: the file's bytes.
        name: where it came from, for messages.
    """

    kind: str

    def __init__(self, data: bytes, name: str):
        self.data, self.name = data, name

    @staticmethod
    def from_bytes(kind: str, data: bytes, name: str = "tokenizer") -> Tokenizer:
        """Build a tokenizer from its kind and its file's bytes, as stored with data and checkpoints.

        Raises:
            DataError: the bytes are no tokenizer of that kind.
            UsageError: the kind is unknown.
        """
        if kind == JsonTokenizer.kind:
            return JsonTokenizer(data, name)
        from libneox.tokenizer_kinds import KINDS

        if kind not in KINDS:
            raise UsageError(
                f"{name}: unknown kind of tokenizer {kind!r}; this version reads {[*KINDS, 'tokenizer.json']}"
            )
        return KINDS[kind](data, name)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of the tokenizer's file."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids: one more than the largest, added tokens included."""

    @property
    def dtype(self) -> str:
        """The smallest of the two token types that holds every id: "uint16" or "int32"."""
        return "uint16" if self.vocab_size < UINT16_BELOW else "int32"

    @property
    def eod_id(self) -> int | None:
        """The id that ends a document, or None if the tokenizer has none of the usual names."""
        return self._first_id(EOD_TOKENS)

    @property
    def pad_id(self) -> int | None:
        """The padding id, or None."""
        return self._first_id(PAD_TOKENS)

    def _first_id(self, names: Iterable[str]) -> int | None:
        return next((i for i in map(self.token_id, names) if i is not None), None)

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, or None."""

    def encode(self, text: str, *, allow_special: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Ids of one text; see `encode_batch`.

        Raises:
            DataError: the text holds a lone surrogate, as JSON can say but no tokenizer can encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise DataError(f"the text holds U+{code:04X}, half of a surrogate pair and no character") from error
        return self.encode_batch([text], allow_special=allow_special, add_special_tokens=add_special_tokens)[0].tolist()

    @abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        """Ids of each text, int64 [n].

        Args:
            texts: without lone surrogates, which no tokenizer can encode.
            allow_special: recognise special tokens written out in the text; off, `<|endoftext|>` is ordinary text.
            add_special_tokens: add what the tokenizer's own template adds, for example a BOS in front.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD. Ids outside the vocabulary raise DataError."""

    def _check_ids(self, ids: Iterable[int]) -> list[int]:
        result = [int(i) for i in ids]
        if result and not 0 <= min(result) <= max(result) < self.vocab_size:
            bad = next(i for i in result if not 0 <= i < self.vocab_size)
            raise DataError(
                f"{self.name}: id {bad} is not below the vocabulary size {self.vocab_size}; another tokenizer?"
            )
        return result


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library."""

    kind = "tokenizer.json"

    def __init__(self, data: bytes, name: str):
        super().__init__(data, name)
        self._special_as_text: tokenizers.Tokenizer = self._load()
        self._special_as_text.encode_special_tokens = True
        self._size = max(self._special_as_text.get_vocab().values(), default=-1) + 1

    def _load(self) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(self.data.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(f"{self.name}: not a tokenizer.json ({str(error).splitlines()[0]})") from error
        backend.no_truncation()  # files saved for a classifier cut and pad; a corpus must be neither
        backend.no_padding()
        return backend

    @cached_property
    def _special_as_ids(self) -> tokenizers.Tokenizer:
        return self._load()

    @property
    def vocab_size(self) -> int:
        return self._size

    def token_id(self, token: str) -> int | None:
        result: int | None = self._special_as_text.token_to_id(token)
        return result

    def backend(self, *, allow_special: bool = False) -> tokenizers.Tokenizer:
        """The `tokenizers` object that encodes; not to be changed."""
        return self._special_as_ids if allow_special else self._special_as_text

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        import numpy as np

        backend = self.backend(allow_special=allow_special)
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        text: str = self._special_as_text.decode(self._check_ids(ids), skip_special_tokens=skip_special_tokens)
        return text


def byte_tokenizer() -> JsonTokenizer:
    """The built-in tokenizer: <|endoftext|> is 0, <|padding|> is 1, byte b is 2 + b; 258 ids."""
    return JsonTokenizer(_byte_tokenizer_json(), BYTES)


def _byte_tokenizer_json() -> bytes:
    """The built-in tokenizer as a tokenizer.json that every reader of that format takes."""
    specials = EOD_TOKENS[0], PAD_TOKENS[0]
    vocab = {name: i for i, name in enumerate(specials)}
    vocab |= {character: 2 + byte for byte, character in enumerate(_byte_characters())}
    byte_level: dict[str, Any] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [],
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files (GPT-2, bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
