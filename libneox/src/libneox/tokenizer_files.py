# SPDX-License-Identifier: Apache-2.0
"""Finding a tokenizer on disk and reading it into (kind, bytes)."""

from __future__ import annotations

import json
from pathlib import Path

from libneox.errors import DataError, InputMissing
from libneox.legacy import is_legacy, stored_tokenizer

CHARLEVEL = "charlevel"
# In a directory, in this order. A run's newest checkpoint is found through its `latest`; the configuration in a
# checkpoint of GPT-NeoX may name a file.
NAMES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "tokenizer.tiktoken")


def read(source: str | Path) -> tuple[str, bytes]:
    """The kind and the file's bytes of the tokenizer at `source`, a file or a directory.

    Raises:
        InputMissing: nothing there, or a directory without a tokenizer.
        DataError: the file is no tokenizer of a known kind.
    """
    if str(source) == CHARLEVEL:
        return CHARLEVEL, CHARLEVEL.encode()
    if str(source).startswith("tiktoken:"):
        from libneox.tokenizer_kinds import tiktoken_named

        return "tiktoken", tiktoken_named(str(source).removeprefix("tiktoken:"))
    path = Path(source)
    if path.is_dir():
        path = _in_directory(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        hint = "" if path.exists() else "; name a tokenizer.json, a directory that holds one, or `bytes`"
        raise InputMissing(f"{path}: {error.strerror}{hint}") from error
    return _recognise(path, data)


def _in_directory(directory: Path) -> Path:
    for folder in (directory, directory / "latest"):
        for name in NAMES:
            if (folder / name).is_file():
                return folder / name
    if is_legacy(directory) and (named := stored_tokenizer(directory)) is not None:
        return named
    raise InputMissing(f"{directory}: no tokenizer in this directory (looked for {', '.join(NAMES)})")


def _recognise(path: Path, data: bytes) -> tuple[str, bytes]:
    if data == CHARLEVEL.encode():  # what a checkpoint holds of a tokenizer that has no file
        return CHARLEVEL, data
    if data.lstrip()[:1] == b"{":
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error})") from error
        if isinstance(content.get("model"), dict):  # GPT-2's vocabulary has a token of that name
            return "tokenizer.json", data
        if content and all(type(value) is int for value in content.values()):
            return "tokenizer.json", _from_vocab_and_merges(path, content)
        if "mergeable_ranks" in content:
            return "tiktoken", data
        raise DataError(f"{path}: JSON, but neither a tokenizer.json nor a GPT-2 vocab.json")
    if path.suffix == ".tiktoken":
        from libneox.tokenizer_kinds import tiktoken_file

        return "tiktoken", tiktoken_file(path, data)
    if path.suffix == ".model" or data[:1] == b"\n":
        return "sentencepiece", data
    raise DataError(f"{path}: not a tokenizer (tokenizer.json, vocab.json with merges.txt, .model or .tiktoken)")


def _from_vocab_and_merges(path: Path, vocab: dict[str, int]) -> bytes:
    """A tokenizer.json of GPT-2's own two files: byte-level BPE with GPT-2's split, as in GPT2BPETokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    merges = next((p for p in map(path.with_name, _merges_names(path)) if p.is_file()), None)
    if merges is None:
        raise InputMissing(f"{path}: a GPT-2 vocabulary needs its merges beside it ({_merges_names(path)[0]})")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{merges}: does not fit {path.name} ({error})") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([token for token in ("<|endoftext|>",) if token in vocab])
    return backend.to_str().encode()


def _merges_names(path: Path) -> list[str]:
    """Where merges are looked for: GPT-2's merges.txt, or NeoX's gpt2-merges.txt beside gpt2-vocab.json."""
    return [path.name.replace("vocab.json", "merges.txt"), "merges.txt"]
