# SPDX-License-Identifier: Apache-2.0
"""The tokenizers that are no tokenizer.json: sentencepiece, tiktoken, and GPT-NeoX's character-level one."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.errors import DataError, InputMissing, UsageError
from libneox.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`, run by the `sentencepiece` library, as GPT-NeoX's SPMTokenizer."""

    kind = "sentencepiece"

    def __init__(self, data: bytes, name: str):
        super().__init__(data, name)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise _missing("sentencepiece") from error
        try:
            self._model = SentencePieceProcessor(model_proto=data)
        except Exception as error:  # sentencepiece raises RuntimeError and its own
            raise DataError(f"{name}: not a sentencepiece model ({error})") from error

    @property
    def vocab_size(self) -> int:
        return int(self._model.get_piece_size())

    def token_id(self, token: str) -> int | None:
        i = int(self._model.piece_to_id(token))  # the id of <unk> if there is no such piece
        return i if self._model.id_to_piece(i) == token else None

    @property
    def eod_id(self) -> int | None:
        # as in GPT-NeoX, but never the unknown id, which would end documents at every unknown character
        named, declared = self.token_id("<|endoftext|>"), int(self._model.eos_id())
        return named if named is not None else declared if declared >= 0 else super().eod_id

    @property
    def pad_id(self) -> int | None:
        declared = int(self._model.pad_id())
        return declared if declared >= 0 else super().pad_id

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        import numpy as np

        if allow_special:
            raise UsageError(
                f"{self.name}: sentencepiece never reads control symbols out of text; drop --allow-special"
            )
        return [np.array(ids, dtype=np.int64) for ids in self._model.encode(list(texts), out_type=int)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        kept = self._check_ids(ids)
        if not skip_special_tokens:
            return str(self._model.decode(kept))
        return str(self._model.decode([i for i in kept if not self._model.is_control(i)]))


class TiktokenTokenizer(Tokenizer):
    """A tiktoken encoding: JSON with `name`, `pat_str`, `mergeable_ranks` (base64 to rank) and `special_tokens`."""

    kind = "tiktoken"

    def __init__(self, data: bytes, name: str):
        super().__init__(data, name)
        try:
            import tiktoken
        except ImportError as error:
            raise _missing("tiktoken") from error
        try:
            content: dict[str, Any] = json.loads(data)
            ranks = {base64.b64decode(token): rank for token, rank in content["mergeable_ranks"].items()}
            self._specials: dict[str, int] = content["special_tokens"]
            self._encoding = tiktoken.Encoding(
                content["name"], pat_str=content["pat_str"], mergeable_ranks=ranks, special_tokens=self._specials
            )
        except Exception as error:  # tiktoken's Rust half raises ValueError and its own panics
            raise DataError(f"{name}: not a tiktoken encoding ({type(error).__name__}: {error})") from error

    @property
    def vocab_size(self) -> int:
        return int(self._encoding.max_token_value) + 1

    def token_id(self, token: str) -> int | None:
        return self._specials.get(token)

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        allowed: set[str] = set(self._specials) if allow_special else set()
        return [
            self._encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=()).astype("int64")
            for text in texts
        ]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        specials = set(self._specials.values()) if skip_special_tokens else set()
        kept = [i for i in self._check_ids(ids) if i not in specials]
        try:
            return str(self._encoding.decode(kept, errors="replace"))
        except KeyError as error:
            raise DataError(f"{self.name}: id {error} is not in this encoding") from error


class CharLevelTokenizer(Tokenizer):
    """GPT-NeoX's CharLevelTokenizer: the UTF-8 bytes are the ids; 512 ids, 0 ends a document, 1 pads.

    The ids of NUL and U+0001 in a text are the same as those two. `bytes` has no such clash and is the better choice.
    """

    kind = "charlevel"

    @property
    def vocab_size(self) -> int:
        return 512

    def token_id(self, token: str) -> int | None:
        return {"<|endoftext|>": 0, "<|padding|>": 1}.get(token)

    def encode_batch(
        self, texts: Sequence[str], *, allow_special: bool = False, add_special_tokens: bool = True
    ) -> list[np.ndarray]:
        import numpy as np

        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        kept = [i for i in self._check_ids(ids) if i < 256 and not (skip_special_tokens and i < 2)]
        return bytes(kept).decode(errors="replace")


KINDS: Mapping[str, type[Tokenizer]] = {
    SentencePieceTokenizer.kind: SentencePieceTokenizer,
    TiktokenTokenizer.kind: TiktokenTokenizer,
    CharLevelTokenizer.kind: CharLevelTokenizer,
}


def tiktoken_named(name: str) -> bytes:
    """The data of one of tiktoken's own encodings, such as `cl100k_base`, out of tiktoken's cache.

    Raises:
        InputMissing: tiktoken does not know the name, or cannot reach the encoding's file.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise _missing("tiktoken") from error
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # ValueError for the name, requests' errors for the file
        known = ", ".join(tiktoken.list_encoding_names())
        raise InputMissing(
            f"tiktoken:{name}: cannot be loaded ({type(error).__name__}); known are {known}; "
            "without a network set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from error
    content = {
        "name": encoding.name,
        "pat_str": encoding._pat_str,
        "special_tokens": encoding._special_tokens,
        "mergeable_ranks": _ranks(encoding._mergeable_ranks),
    }
    return json.dumps(content).encode()


def tiktoken_file(path: Path, data: bytes) -> bytes:
    """The data of a `NAME.tiktoken` rank file; the split pattern and specials are those tiktoken has for NAME.

    A rank file holds no pattern, so one under another name cannot be used on its own.

    Raises:
        DataError: the file is damaged, or tiktoken has no encoding of that name.
    """
    try:
        from tiktoken_ext.openai_public import ENCODING_CONSTRUCTORS
    except ImportError as error:
        raise _missing("tiktoken") from error
    if path.stem not in ENCODING_CONSTRUCTORS:
        raise DataError(
            f"{path}: a rank file does not say how text is split; give a JSON file with name, pat_str, mergeable_ranks "
            f"and special_tokens, or call it after an encoding of tiktoken's ({', '.join(ENCODING_CONSTRUCTORS)})"
        )
    try:
        pairs = (line.split() for line in data.splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError as error:
        raise DataError(f"{path}: not a tiktoken rank file ({error})") from error
    content = _pattern_and_specials(ENCODING_CONSTRUCTORS[path.stem])
    return json.dumps({"name": path.stem, **content, "mergeable_ranks": _ranks(ranks)}).encode()


def _pattern_and_specials(constructor: Any) -> dict[str, Any]:
    """What an encoding of tiktoken's says besides its ranks, without loading those: the loaders are blanked out."""
    from types import FunctionType

    blank = dict.fromkeys(("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"), lambda *_, **__: {})
    content = FunctionType(constructor.__code__, {**constructor.__globals__, **blank})()
    return {key: content[key] for key in ("pat_str", "special_tokens")}


def _ranks(ranks: Mapping[bytes, int]) -> dict[str, int]:
    return {base64.b64encode(token).decode(): rank for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])}


def _missing(library: str) -> UsageError:
    return UsageError(f"this tokenizer needs the {library} library; pip install {library}")
