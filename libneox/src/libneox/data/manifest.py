# SPDX-License-Identifier: Apache-2.0
"""PREFIX.json: what was written, from what, and how to check it; and the tokenizer beside a pair.

The manifest says nothing about time or machine, so that the same input makes the same bytes. A pair without one (made
by another tool) is read just as well; only its hashes and its tokenizer are unknown.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.data.mmap import strip_suffix
from libneox.errors import DataError, IntegrityError
from libneox.files import FileRecord

if TYPE_CHECKING:
    from libneox.tokenizer import Tokenizer

FORMAT = "neox-dataset"
VERSION = 1
SUFFIXES = {
    "tokenizer.json": ".tokenizer.json",
    "sentencepiece": ".model",
    "tiktoken": ".tiktoken",
    "charlevel": ".charlevel",
}


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the ids.

    Attributes:
        kind: as `libneox.tokenizer.Tokenizer.kind`.
        sha256: hex fingerprint of its file.
        vocab_size: ids are below it.
        eod_id: the id that ends a document, or None.
    """

    kind: str
    sha256: str
    vocab_size: int
    eod_id: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What PREFIX.json holds.

    Attributes:
        sequences, documents, tokens: counts of the pair.
        dtype: of the tokens, as numpy names it.
        bin, idx: the two files.
        tokenizer: None for data that is no tokens (rewards), or of unknown origin.
        command: the command line that wrote the pair.
        sources: how the input was made, as the token stream or the source manifests tell.
        rejects: documents left out, reason to count.
        part_of: name of the dataset that this one goes with, and is of no use without; None for one of its own.
    """

    sequences: int
    documents: int
    tokens: int
    dtype: str
    bin: FileRecord
    idx: FileRecord
    tokenizer: TokenizerRecord | None = None
    command: tuple[str, ...] = ()
    sources: tuple[Mapping[str, Any], ...] = ()
    rejects: Mapping[str, int] = field(default_factory=dict)
    part_of: str | None = None

    def to_json(self) -> str:
        """The text of PREFIX.json."""
        # ASCII: a command line may hold file names that are no UTF-8
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"


def manifest_path(prefix: str | os.PathLike[str]) -> Path:
    """PREFIX.json."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ".json")


def tokenizer_path(prefix: str | os.PathLike[str], kind: str) -> Path:
    """Where the tokenizer of that kind lies beside a pair."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + SUFFIXES.get(kind, f".{kind}"))


def tokenizer_of(prefix: str | os.PathLike[str]) -> Path | None:
    """The tokenizer file beside a pair, or None if there is none."""
    manifest = read_manifest(prefix)
    kinds = [manifest.tokenizer.kind] if manifest and manifest.tokenizer else SUFFIXES
    for kind in kinds:
        path = tokenizer_path(strip_suffix(prefix), kind)
        if path.is_file():
            return path
    return None


def load_tokenizer_of(prefix: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer beside a pair, loaded; None if there is none.

    Raises:
        IntegrityError: it is not the one the manifest names.
    """
    path = tokenizer_of(prefix)
    if path is None:
        return None
    from libneox.tokenizer import Tokenizer

    manifest = read_manifest(prefix)
    if manifest and manifest.tokenizer:
        kind = manifest.tokenizer.kind
    else:
        kind = next(kind for kind, suffix in SUFFIXES.items() if path.name.endswith(suffix))
    tokenizer = Tokenizer.from_bytes(kind, path.read_bytes(), name=str(path))
    if manifest and manifest.tokenizer and manifest.tokenizer.sha256 != tokenizer.fingerprint:
        raise IntegrityError(
            f"{path}: not the tokenizer that {manifest_path(strip_suffix(prefix)).name} names; put that one back"
        )
    return tokenizer


def read_manifest(prefix: str | os.PathLike[str]) -> Manifest | None:
    """Read PREFIX.json; None if there is none, or if it is some other JSON file.

    Raises:
        DataError: it is a manifest, but damaged or of a later version.
    """
    path = manifest_path(strip_suffix(prefix))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: damaged ({error}); remove it, or write the pair again") from error
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            return None
        if (version := found.pop("version")) != VERSION:
            raise DataError(f"{path}: manifest version {version}, this version reads {VERSION}; update neox-shard")
        return _manifest(found)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged manifest ({error}); remove it, or write the pair again") from error


def _manifest(found: dict[str, Any]) -> Manifest:
    tokenizer = found.pop("tokenizer")
    files = {name: FileRecord(**found.pop(name)) for name in ("bin", "idx")}
    lists = {name: tuple(found.pop(name)) for name in ("command", "sources")}
    return Manifest(tokenizer=TokenizerRecord(**tokenizer) if tokenizer else None, **files, **lists, **found)
