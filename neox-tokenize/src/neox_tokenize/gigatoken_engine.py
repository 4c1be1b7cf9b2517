# SPDX-License-Identifier: Apache-2.0
"""The fast engine: gigatoken, where its ids are the reference's, and only there.

Four fences stand between a differing id and the data:
1. The tokenizer must be of the kind that was compared: byte-level BPE with GPT-2's split, NFC or no normalizer.
2. A probe at start encodes edge cases and every added token with both.
3. Texts with special tokens written out, or with characters that the two libraries' Unicode tables treat differently
   (below), go to the reference.
4. While running, a sample of the documents, 0.1 % of the bytes, is encoded by both. A difference ends the run.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from libneox.errors import NeoxError
from libneox.tokenizer import JsonTokenizer
from neox_tokenize.engines import ReferenceEngine

if TYPE_CHECKING:
    import numpy as np

# Code points that tokenizers 0.23.3 and gigatoken 0.10.0 do not treat alike, found by encoding every code point of
# Unicode in several contexts, and every combining mark beside marks of other classes, with both: tokenizers normalizes
# by Unicode 9 and splits by Unicode 16, gigatoken does both by Unicode 17. Gaps of unassigned points are closed.
DIFFERING = (
    "7FD 88F 897-89F 8CA-8D3 9FE C3C C5C CDC D3B-D3C EBA 1715 1ABF-1AEB 1DF6-1DFA A7CE-A7D4 A7F1 A82C 105C0-105FF "
    "10940-10959 10D24-10D27 10D69-10D6D 10EAB-10EFF 10F46-10F85 11070 1133B 11380-113FF 1145E 11839-1183A 11930-11943 "
    "119E0 11A34-11A47 11A99 11D42-11D45 11D97-11DE9 11F41-11F42 16100-1613F 16D40-16D7F 16EA0-16ED3 16FF0-16FF6 "
    "187F8-187FF 18D09-18D1E 18D80-18DF2 1E08F 1E130-1E136 1E2AE-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1E6C0-1E6FF 2B73A-2B73F "
    "2CEA2-2CEAD 323B0-33479"
)
CHECKED_SHARE = 0.001  # of the bytes, encoded twice
CHECKED_AT_ONCE = 32  # documents of one block
SLICE = 1 << 20  # characters looked up at once


class EnginesDiffer(NeoxError):
    """The fast engine gave other ids than the reference."""


class Unsuitable(Exception):
    """Why the fast engine is not used for a tokenizer."""


class GigatokenEngine:
    """Encode with gigatoken. Calls from several threads take turns; each call uses `workers` threads.

    Raises:
        Unsuitable: gigatoken is not installed, the tokenizer is of another kind, or the probe found a difference.
    """

    name = "gigatoken"

    def __init__(self, tokenizer: JsonTokenizer, dtype: str, *, workers: int, allow_special: bool):
        if allow_special:
            raise Unsuitable("special tokens in texts are recognised")
        config = _require_compared_kind(tokenizer)
        # read once by the thread pools of both libraries; our own threads wait while one encodes
        os.environ["RAYON_NUM_THREADS"] = str(workers)
        try:
            import awkward  # noqa: F401 - gigatoken returns its arrays
            import gigatoken
        except ImportError as error:
            raise Unsuitable(f"gigatoken cannot be imported ({error})") from error
        try:
            self._backend = gigatoken.Tokenizer.from_json(tokenizer.data).backend
        except Exception as error:  # gigatoken raises ValueError and Rust panics
            raise Unsuitable(f"gigatoken does not read it ({str(error).splitlines()[0]})") from error
        self._dtype, self._parallel = dtype, workers > 1
        self._reference = ReferenceEngine(tokenizer, dtype, allow_special=False)
        self._specials = [token["content"] for token in config.get("added_tokens") or () if token["special"]]
        self._special_start = os.path.commonprefix(self._specials)
        self._lock = threading.Lock()
        self._seen = self._checked = 0
        self._differing = _differing_table()
        self._probe(tokenizer, config)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See `Engine.encode`; raises EnginesDiffer if a checked document's ids are not the reference's."""
        odd = self._for_reference(texts)
        if len(odd) == len(texts):
            return self._reference.encode(texts)
        if not odd:
            values, lengths = self._fast(texts)
        else:
            values, lengths = self._merge(texts, odd)
        self._recheck(texts, values, lengths)
        return values, lengths

    def _fast(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        with self._lock:
            layout = self._backend.encode_batch(list(texts), parallel=self._parallel).layout
        return np.asarray(layout.content.data).astype(self._dtype), np.diff(np.asarray(layout.offsets.data))

    def _merge(self, texts: Sequence[str], odd: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Encode the texts numbered in `odd` by the reference and put them between the others."""
        import numpy as np

        is_odd = np.zeros(len(texts), dtype=bool)
        is_odd[list(odd)] = True
        slow_values, slow_lengths = self._reference.encode([texts[i] for i in odd])
        fast_values, fast_lengths = self._fast([text for i, text in enumerate(texts) if not is_odd[i]])
        lengths = np.empty(len(texts), dtype=np.int64)
        lengths[is_odd], lengths[~is_odd] = slow_lengths, fast_lengths
        values = np.empty(len(slow_values) + len(fast_values), dtype=self._dtype)
        odd_tokens = np.repeat(is_odd, lengths)
        values[odd_tokens], values[~odd_tokens] = slow_values, fast_values
        return values, lengths

    def _for_reference(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts that only the reference may encode."""
        found = {i for i, text in enumerate(texts) if self._special_start in text and self._has_special(text)}
        foreign = [i for i, text in enumerate(texts) if not text.isascii()]
        if foreign and self._have_differing([texts[i] for i in foreign]):
            found |= {i for i in foreign if self._have_differing([texts[i]])}
        return sorted(found)

    def _has_special(self, text: str) -> bool:
        return any(special in text for special in self._specials)

    def _have_differing(self, texts: Sequence[str]) -> bool:
        import numpy as np

        joined = texts[0] if len(texts) == 1 else "\n".join(texts)
        for start in range(0, len(joined), SLICE):  # UTF-32 of a whole large text would be four times as large
            points = np.frombuffer(joined[start : start + SLICE].encode("utf-32-le"), dtype=np.uint32)
            if self._differing[points].any():
                return True
        return False

    def _recheck(self, texts: Sequence[str], values: np.ndarray, lengths: np.ndarray) -> None:
        """Encode some documents again by the reference, as many as the budget of checked bytes allows."""
        import numpy as np

        chosen = self._choose(texts)
        if not chosen:
            return
        ends = np.cumsum(lengths)
        again, again_lengths = self._reference.encode([texts[i] for i in chosen])
        expected = np.split(again, np.cumsum(again_lengths)[:-1])
        for i, reference in zip(chosen, expected, strict=True):
            if not np.array_equal(values[ends[i] - lengths[i] : ends[i]], reference):
                raise EnginesDiffer(
                    f"gigatoken and tokenizers give different ids for the text that starts {texts[i][:60]!r}; "
                    "nothing was finished; run again with --engine tokenizers, and please report the text"
                )

    def _choose(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the documents to check, from a place that moves on, so that no kind of document is left out."""
        with self._lock:
            self._seen += sum(map(len, texts))
            budget = int(self._seen * CHECKED_SHARE) - self._checked
            start = self._seen % len(texts)
            chosen: list[int] = []
            for i in (*range(start, len(texts)), *range(start)):
                if 0 < len(texts[i]) <= budget:
                    chosen.append(i)
                    budget -= len(texts[i])
                    self._checked += len(texts[i])
                if budget <= 0 or len(chosen) == CHECKED_AT_ONCE:
                    break
            return chosen

    def _probe(self, tokenizer: JsonTokenizer, config: dict[str, Any]) -> None:
        texts = [text for text in probe_texts(config) if not self._for_reference([text])]
        fast, reference = self._fast(texts), self._reference.encode(texts)
        if not all((a == b).all() if len(a) == len(b) else False for a, b in zip(fast, reference, strict=True)):
            raise Unsuitable("its ids differ from those of tokenizers")


def probe_texts(config: dict[str, Any]) -> list[str]:
    """Texts that tell engines apart: edges of the split, every added token in context, words of the vocabulary."""
    rng = random.Random(0)
    added = [token["content"] for token in config.get("added_tokens") or ()]
    texts = [f"{left}{token}{right}" for token in added for left in ("", "a", " ", "\n") for right in ("", "b", " ")]
    texts += [
        f"x{space * n}y{space * n}" for space in " \t\n\r\u00a0\u3000" for n in (1, 2, 3, 5, 8, 23, 24, 25, 49, 100)
    ]
    texts += [
        "I'll we've 'S they'RE '' 's",
        "\r\n\r\n \n\t x",
        "a" * 3000,
        "1234567890" * 30,
        "\0\x01\x7f\x85\u2028\ufeff",
    ]
    texts += ["e\u0301\u0323 \u1e69 \ud55c\uae00 \u1112\u1161\u11ab \u05e9\u05c1\u05bc \u0646\u0651\u064e \u212b\u2126"]
    texts += [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 \u65e5\u672c\u8a9e\u3002 \u0441\u043b\u043e \u2167\u00bd\u0662"
    ]
    words = [word.replace("\u0120", " ").replace("\u010a", "\n") for word in config["model"]["vocab"]]
    texts += ["".join(rng.choices(words, k=20)) for _ in range(200)]
    blocks = (
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x300, 0x370),
        (0x370, 0x700),
        (0x900, 0xE00),
        (0x1E00, 0x2400),
        (0x4E00, 0x9FFF),
    )
    for _ in range(300):
        low, high = rng.choice(blocks)
        texts.append("".join(chr(rng.randrange(*rng.choice(((low, high), (0x20, 0x7F))))) for _ in range(30)))
    return texts


def _require_compared_kind(tokenizer: JsonTokenizer) -> dict[str, Any]:
    """The tokenizer.json as an object, if it is of the compared kind."""
    config: dict[str, Any] = json.loads(tokenizer.data)
    model, split = config["model"], config.get("pre_tokenizer") or {}
    reasons = {
        "its model is not BPE": model.get("type") == "BPE",
        "its BPE has extras": not any(
            model.get(key)
            for key in (
                "dropout",
                "unk_token",
                "continuing_subword_prefix",
                "end_of_word_suffix",
                "byte_fallback",
                "fuse_unk",
                "ignore_merges",
            )
        ),
        "its normalizer is not NFC": (config.get("normalizer") or {"type": "NFC"}) == {"type": "NFC"},
        "its split is not GPT-2's": split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space"),
        "it adds tokens of its own": (config.get("post_processor") or {}).get("type", "ByteLevel") == "ByteLevel",
        "its added tokens match in special ways": not any(
            token.get(key) for token in config.get("added_tokens") or () for key in ("single_word", "lstrip", "rstrip")
        ),
    }
    for reason, holds in reasons.items():
        if not holds:
            raise Unsuitable(reason)
    return config


def _differing_table() -> np.ndarray:
    """bool [0x110000]: whether a code point is among DIFFERING."""
    import numpy as np

    table = np.zeros(0x110000, dtype=bool)
    for entry in DIFFERING.split():
        low, _, high = entry.partition("-")
        table[int(low, 16) : int(high or low, 16) + 1] = True
    return table
