# SPDX-License-Identifier: Apache-2.0
"""Files appear whole or not at all; what cannot be written is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from libneox import files
from libneox.errors import InputMissing, OutputExists


def test_atomic_write_commits_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with files.atomic_write(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with files.atomic_write(path) as file:
        file.write(b"two")
    assert path.read_bytes() == b"two"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), files.atomic_write(path) as file:
        file.write("text where bytes are due")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00e9" * 127, "x" + "\u65e5" * 84])
def test_names_at_the_length_limit(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with files.atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_check_output(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert files.check_output(path) == path
    path.touch()
    with pytest.raises(OutputExists, match="--force"):
        files.check_output(path)
    assert files.check_output(path, force=True) == path
    with pytest.raises(OutputExists, match="no such directory"):
        files.check_output(tmp_path / "missing" / "a")
    with pytest.raises(OutputExists, match="no such directory"):
        files.check_output(path / "b")
    with pytest.raises(OutputExists, match="is a directory"):
        files.check_output(tmp_path, force=True)
    with pytest.raises(OutputExists, match="no regular file"):
        files.check_output("/dev/null", force=True)


def test_open_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="No such file"):
        files.open_input(tmp_path / "missing")
    with pytest.raises(InputMissing, match="directory"):
        files.open_input(tmp_path)
    (tmp_path / "a").write_bytes(b"x")
    with files.open_input(tmp_path / "a") as file:
        assert file.read() == b"x"


def test_sha256_of_a_known_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert files.sha256_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1536, "1.5 KB"), (2_000_000, "2.0 MB"), (3.21e12, "3.21 TB")]
)
def test_human_bytes(count: float, text: str) -> None:
    assert files.human_bytes(count) == text


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("before", ["nothing", "directory", "file", "dangling link"])
def test_a_directory_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    made, target = tmp_path / "made", tmp_path / "target"
    made.mkdir()
    (made / "new").touch()
    if before == "directory":
        target.mkdir()
        (target / "old").touch()
    elif before == "file":
        target.touch()
    elif before == "dangling link":
        target.symlink_to("nowhere")
    files.put_in_place(made, target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_names_are_exchanged_here(tmp_path: Path) -> None:
    """And where they are, nobody sees the place empty: the new directory is there before the old one is gone."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("not on this file system")
    assert (tmp_path / "a/b").exists()
    assert (tmp_path / "b/a").exists()
    assert not files._exchange(tmp_path / "a", tmp_path / "missing")
