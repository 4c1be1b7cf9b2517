# SPDX-License-Identifier: Apache-2.0
"""Lists of checksums are those of sha256sum, whatever the names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from libneox.errors import DataError, InputMissing
from libneox.files import sha256_file
from libneox.sums import read_sums, sum_line

NAMES = [b"plain", b"two words", b"new\nline", b"back\\slash\\n", b"not-utf8-\xff", "line\u2028end".encode(), b"a\rb"]


def test_sha256sum_reads_and_writes_the_same_lists(tmp_path: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    names = [os.fsdecode(name) for name in NAMES]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"%d" % number)
    sums = {name: sha256_file(tmp_path / name) for name in names}
    ours = tmp_path / "ours"
    ours.write_bytes(b"".join(sum_line(digest, name) for name, digest in sums.items()))
    assert read_sums(ours) == sums
    subprocess.run(["sha256sum", "--check", "--strict", "ours"], cwd=tmp_path, check=True, capture_output=True)
    theirs = subprocess.run(["sha256sum", *NAMES], cwd=tmp_path, check=True, capture_output=True).stdout
    (tmp_path / "theirs").write_bytes(theirs)
    assert read_sums(tmp_path / "theirs") == sums


def test_other_forms_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "list").write_text(f"{'AB' * 32} *binary\n{'cd' * 32}  mid\r\n{'cd' * 32}  last without newline")
    assert read_sums(tmp_path / "list") == {"binary": "ab" * 32, "mid": "cd" * 32, "last without newline": "cd" * 32}


@pytest.mark.parametrize("text", ["nonsense\n", f"{'ab' * 32}  a\n\n", f"{'ab' * 31}  a\n"])
def test_what_is_no_list_is_named_by_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(DataError, match=r"list:[12]: not a line"):
        read_sums(tmp_path / "list")
    with pytest.raises(InputMissing):
        read_sums(tmp_path / "none")
