# SPDX-License-Identifier: Apache-2.0
"""Tensors in and out of a step directory."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from libneox import run_directory
from libneox.checkpoint import store
from libneox.errors import DataError, InputMissing, IntegrityError, OutputExists


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(11, 4, generator=generator),
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "counter": torch.arange(7),
        "transposed": torch.randn(4, 6, generator=generator).T,
    }


def test_values_come_back_bit_for_bit(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = store.write_checkpoint(tmp_path / "step_3", tensors, config_yaml="a: 1\n", tokenizer=b"{}", step=3)
    manifest = run_directory.verify_step(path)
    assert manifest.step == 3
    assert manifest.tokenizer is not None
    assert manifest.tokenizer["kind"] == "tokenizer.json"
    with store.open_tensors(path) as found:
        assert set(found) == set(tensors)
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
            assert found.spec(name) == store.TensorSpec(name, value.dtype, tuple(value.shape))


def test_the_files_are_ordinary_safetensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = store.write_checkpoint(tmp_path / "s", tensors, config_yaml="")
    found = load_file(path / "model-00001-of-00001.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_files_have_the_mode_of_any_other_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    old = os.umask(0o027)
    try:
        path = store.write_checkpoint(tmp_path / "s", tensors, config_yaml="")
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o640}


def test_shards_are_cut_by_size_and_read_as_one(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = store.write_checkpoint(tmp_path / "s", tensors, config_yaml="", shard_bytes=100)
    files = sorted(p.name for p in path.glob("model-*"))
    assert len(files) > 2
    assert files[0].endswith(f"-of-{len(files):05d}.safetensors")
    with store.open_tensors(path) as found:
        assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_each_writer_has_its_share() -> None:
    specs = [store.TensorSpec(f"t{i}", torch.float32, (100,)) for i in range(40)]
    plan = store.plan_files("model", specs, writers=4)
    assert [file.owner for file in plan] == [0, 1, 2, 3]
    assert [spec for file in plan for spec in file.specs] == specs


def test_several_writers_make_one_group(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = [store.TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()]
    plan = store.plan_files("model", specs, writers=2)
    asked: list[list[str]] = []
    for rank in (0, 1):
        asked.append([])

        def load(name: str, rank: int = rank) -> torch.Tensor:
            asked[rank].append(name)
            return tensors[name]

        store.write_planned(tmp_path, plan, load, rank=rank)
    assert asked[0] == asked[1] == list(tensors)  # a collective works
    with store.Tensors(sorted(tmp_path.iterdir())) as found:
        assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_one_tensor_at_a_time_is_asked_for(tmp_path: Path) -> None:
    class Lazy(Mapping[str, torch.Tensor]):
        asked: list[str] = []

        def __getitem__(self, name: str) -> torch.Tensor:
            self.asked.append(name)
            return torch.ones(3)

        def __iter__(self) -> Iterator[str]:
            return iter(["a", "b"])

        def __len__(self) -> int:
            return 2

    specs = [store.TensorSpec(name, torch.float32, (3,)) for name in ("a", "b")]
    store.write_checkpoint(tmp_path / "s", Lazy(), config_yaml="", specs=specs)
    assert Lazy.asked == ["a", "b"]


def test_a_wrong_shape_leaves_nothing(tmp_path: Path) -> None:
    specs = [store.TensorSpec("a", torch.float32, (4,))]
    with pytest.raises(ValueError, match="expected"):
        store.write_checkpoint(tmp_path / "step_1", {"a": torch.ones(3)}, config_yaml="", specs=specs)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    store.write_checkpoint(tmp_path / "s", {"a": torch.ones(3)}, config_yaml="")
    with pytest.raises(OutputExists):
        store.write_checkpoint(tmp_path / "s", {"a": torch.zeros(3)}, config_yaml="")
    store.write_checkpoint(tmp_path / "s", {"a": torch.zeros(3)}, config_yaml="", force=True)
    with store.open_tensors(tmp_path / "s") as found:
        assert torch.equal(found["a"], torch.zeros(3))


def test_twenty_random_bytes_of_each_file_and_every_byte_of_headers(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    path = store.write_checkpoint(
        tmp_path / "step_1",
        tensors,
        config_yaml="a: 1\n",
        tokenizer=b"{}",
        trainer={"step": 1},
        optimizer_tensors=tensors,
    )
    chosen = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        places = [chosen.randrange(len(whole)) for _ in range(20)]
        if file.suffix == ".safetensors":
            places += range(8 + int.from_bytes(whole[:8], "little"))
        for at in places:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << chosen.randrange(8))]) + whole[at + 1 :])
            with pytest.raises(IntegrityError, match=file.name):
                run_directory.verify_step(path)
        file.write_bytes(whole)
    run_directory.verify_step(path)


def hostile(header: dict[str, object] | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        hostile({}, length=2**63),
        hostile(b"{" * 1000),
        hostile({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}),
        hostile({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        hostile(
            {
                "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
                "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            }
        ),
    ],
    ids=["empty", "short", "huge-header", "no-json", "misfit", "beyond-the-end", "overlap"],
)
def test_a_hostile_file_is_bad_data(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="x.safetensors"):
        store.Tensors([tmp_path / "x.safetensors"])


def test_missing_and_doubled(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        store.Tensors([tmp_path / "none.safetensors"])
    for name in ("x", "y"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DataError, match="again"):
        store.Tensors([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
