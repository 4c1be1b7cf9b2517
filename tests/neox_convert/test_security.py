# SPDX-License-Identifier: Apache-2.0
"""Series E: hostile checkpoints are refused or read as data; nothing in them runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from libneox.checkpoint.hf import open_hf
from libneox.checkpoint.neox import open_neox
from libneox.checkpoint.neox.torchfile import TorchFile
from libneox.errors import DataError, InputMissing, UnsafeInput
from neox_convert import look
from neox_convert.source import find_source
from tests.peak_memory import measured


class Payload:
    """Unpickled by anything that resolves names, it makes the canary file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("as_zip", [True, False], ids=["torch.save", "pickle"])
def test_e01_payload_in_pytorch_model_bin(
    tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any, as_zip: bool
) -> None:
    canary = tmp_path / "canary"
    model = make_hf(tmp_path / "hf", small_config())
    (model / "model.safetensors").unlink()
    if as_zip:
        torch.save({"embed": Payload(canary)}, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    done = run_command(["neox-convert", "from-hf", model, tmp_path / "run"])
    assert done.returncode == 77, done.stderr
    assert b"posix.system" in done.stderr
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["neox-gen", "neox-eval", "neox-train"])
def test_e01_the_other_commands_refuse_it_too(
    tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any, command: str
) -> None:
    canary = tmp_path / "canary"
    model = make_hf(tmp_path / "hf", small_config())
    (model / "model.safetensors").unlink()
    torch.save({"embed": Payload(canary)}, model / "pytorch_model.bin")
    (tmp_path / "task.yaml").write_text("task: t\ndataset_path: json\n")
    arguments: dict[str, list[Any]] = {
        "neox-gen": [model],
        "neox-eval": [model, "--tasks", tmp_path / "task.yaml"],
        "neox-train": _train_arguments(tmp_path, model),
    }
    done = run_command([command, *arguments[command]], input=b'{"prompt": "a"}\n')
    assert done.returncode == 77, done.stderr
    assert not canary.exists()


def _train_arguments(folder: Path, model: Path) -> list[str]:
    from libneox.data.writer import DatasetWriter

    with DatasetWriter(folder / "data", np.uint16) as writer:
        writer.add(np.arange(2000) % 256, np.full(20, 100))
        writer.commit()
    settings = {
        "load": model,
        "data_path": folder / "data",
        "save": folder / "run",
        "train_iters": 2,
        "precision": "fp32",
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "rotary_pct": 0.5,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "vocab_size": 258,
        "padded_vocab_size": 384,
        "train_micro_batch_size_per_gpu": 2,
        "train_batch_size": 2,
    }
    return ["pythia/14M", *(word for name, value in settings.items() for word in ("--set", f"{name}={value}"))]


@pytest.mark.parametrize(
    "callable_name", ["builtins eval", "os system", "torch load", "numpy load", "torch.storage _load_from_bytes"]
)
def test_e01_no_other_name_is_resolved(tmp_path: Path, callable_name: str) -> None:
    module, name = callable_name.split()
    code = b"\x80\x02c" + module.encode() + b"\n" + name.encode() + b"\nX\x01\x00\x00\x001\x85R."
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with pytest.raises(UnsafeInput, match=name):
        TorchFile(tmp_path / "evil.pt").read()


def test_e01_no_file_can_change_what_the_next_one_resolves(tmp_path: Path) -> None:
    """Setting attributes on what a name resolves to (BUILD with slot state) reaches no shared object."""
    code = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__NsX\x05\x00\x00\x00extraK\x01s\x86b."
    )
    with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
        archive.writestr("archive/data.pkl", code)
    with contextlib.suppress(DataError):
        TorchFile(tmp_path / "evil.pt").read()
    torch.save({"a": torch.arange(3.0)}, tmp_path / "good.pt")
    assert torch.equal(TorchFile(tmp_path / "good.pt").read()["a"].load(), torch.arange(3.0))


@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt"])
def test_e02_payload_in_a_deepspeed_directory(tmp_path: Path, run_command: Any, name: str) -> None:
    step = tmp_path / "save" / "global_step1"
    step.mkdir(parents=True)
    (tmp_path / "save" / "latest").write_text("global_step1")
    config = tmp_path / "config.yml"
    config.write_text("num_layers: 1\nhidden_size: 8\nnum_attention_heads: 1\nmax_position_embeddings: 8\n")
    canary = tmp_path / "canary"
    torch.save({"module": {"sequential.0.word_embeddings.weight": torch.ones(2, 2)}, "x": Payload(canary)}, step / name)
    done = run_command(["neox-convert", "from-neox", tmp_path / "save", tmp_path / "run", "--config", config])
    assert done.returncode == 77, done.stderr
    with pytest.raises(UnsafeInput):
        open_neox(step, config=[config])
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_e02_distributed_checkpoint_metadata(tmp_path: Path, run_command: Any) -> None:
    """torch.distributed.checkpoint's .metadata is a pickle that stock readers execute; we do not read it at all."""
    canary = tmp_path / "canary"
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload(canary)))
    (folder / "__0_0.distcp").write_bytes(b"\0" * 100)
    assert run_command(["neox-convert", "from-neox", folder, tmp_path / "run"]).returncode == 66
    for open_it in (find_source, open_hf):
        with pytest.raises(InputMissing):
            open_it(str(folder))
    with pytest.raises(UnsafeInput):
        look.inspect(str(folder / ".metadata"), hashes=False, as_json=False, stdout=io.BytesIO())
    assert not canary.exists()


def test_e03_remote_code_is_not_looked_at(tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any) -> None:
    """auto_map, a modeling file, and attention implementations named by config.json change nothing, in --verify too."""
    canary = tmp_path / "canary"
    model = make_hf(tmp_path / "hf", small_config())
    (model / "modeling_x.py").write_text(f"open({str(canary)!r}, 'w')\nclass X: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {
        "auto_map": {"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.X"},
        "_attn_implementation_internal": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "trust_remote_code": True,
    }
    (model / "config.json").write_text(json.dumps(config))
    done = run_command(["neox-convert", "from-hf", model, tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    assert b"logits of ours and of transformers differ by at most" in done.stderr
    assert not canary.exists()
    assert not list((tmp_path / "run").rglob("*.py"))


def test_e03_modules_in_the_current_directory_are_not_imported(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    """`cd` into a downloaded model that holds a torch.py: the process that checks the result imports none of it."""
    canary = tmp_path / "canary"
    model = make_hf(tmp_path / "hf", small_config())
    for name in ("torch", "transformers", "json", "neox_convert"):
        (model / f"{name}.py").write_text(f"open({str(canary)!r}, 'w')\n")
    command = [sys.executable, "-P", "-m", "neox_convert", "from-hf", ".", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=model, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"logits of ours and of transformers differ by at most" in done.stderr
    assert not canary.exists()


def _header(value: Any, data: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def _entry(dtype: str = "F32", shape: tuple[int, ...] = (4,), offsets: tuple[int, int] = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BAD_FILES = {
    "length_2_63": struct.pack("<Q", 1 << 63) + b"{}",
    "length_past_the_end": struct.pack("<Q", 1000) + b"{}",
    "empty": b"",
    "overlap": _header({"a": _entry(), "b": _entry(offsets=(8, 24))}, b"\0" * 24),
    "shape": _header({"a": _entry(shape=(5,))}, b"\0" * 16),
    "dtype": _header({"a": _entry(dtype="F16")}, b"\0" * 16),
    "dtype_of_a_quantised_model": _header({"a": _entry(dtype="F8_E4M3", shape=(16,))}, b"\0" * 16),
    "no_such_dtype": _header({"a": _entry(dtype="X99")}, b"\0" * 16),
    "past_the_end": _header({"a": _entry(offsets=(0, 1 << 40), shape=(1 << 38,))}),
    "negative": _header({"a": _entry(shape=(-4,))}, b"\0" * 16),
    "not_json": struct.pack("<Q", 4) + b"{{{{",
    "header_missing": struct.pack("<Q", 8),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_e04_absurd_safetensors(tmp_path: Path, make_hf: Any, small_config: Any, case: str) -> None:
    model = make_hf(tmp_path / "hf", small_config())
    (model / "model.safetensors").write_bytes(BAD_FILES[case])
    with pytest.raises(DataError, match=r"model\.safetensors"):
        open_hf(model)


def test_e04_header_of_100_mb(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    healthy, model = (make_hf(tmp_path / name, small_config()) for name in ("healthy", "hf"))
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 100_000_000) + b'{"' + b"a" * 99_999_998)
        file.truncate(200_000_000)
    assert _peak(65, "from-hf", model, tmp_path / "run") <= _peak(0, "inspect", healthy) + 200_000_000
    assert not (tmp_path / "run").exists()


def _peak(code: int, *arguments: os.PathLike[str] | str) -> int:
    """Peak memory in bytes of a `neox-convert` that ends with that code."""
    with tempfile.NamedTemporaryFile() as report:
        command = measured([sys.executable, "-m", "neox_convert", *arguments], Path(report.name))
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        return int(report.read())


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/passwd", "a/../../b.safetensors", ".."])
def test_e05_index_that_leads_out(tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any, name: str) -> None:
    model = make_hf(tmp_path / "hf", small_config(), files=2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = name
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeInput, match="leads out of the directory"):
        open_hf(model)


def test_e06_catastrophic_regex_in_a_tokenizer(
    tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any
) -> None:
    model = make_hf(tmp_path / "hf", small_config())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": r"(x+x+)+y|(.|\s)*z"},
        "behavior": "Isolated",
        "invert": False,
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run_command(["neox-convert", "from-hf", model, tmp_path / "run"], timeout=100)
    assert done.returncode in (0, 65), done.stderr


def test_e07_object_arrays_are_not_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    array = np.empty(1, dtype=object)
    array[0] = Payload(canary)
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    torch.save({"a": array}, tmp_path / "x.pt")
    for name, error in (("x.npy", DataError), ("x.pt", UnsafeInput)):
        with pytest.raises(error):
            look.inspect(str(tmp_path / name), hashes=False, as_json=False, stdout=io.BytesIO())
    assert not canary.exists()


@pytest.mark.parametrize("where", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_torch_file_is_said_to_be(tmp_path: Path, where: float) -> None:
    torch.save({"a": torch.arange(5000.0)}, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: int(len(data) * where)])
    with pytest.raises(DataError, match=r"a\.pt"):
        TorchFile(tmp_path / "a.pt").read()


@pytest.mark.parametrize("member", ["byteorder", "data.pkl"])
def test_a_damaged_member_is_bad_data(tmp_path: Path, member: str) -> None:
    torch.save({"a": torch.arange(5.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(f"/{member}"))
    name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
    data[info.header_offset + 30 + name_length + extra_length] ^= 0xFF
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.pt: damaged"):
        TorchFile(tmp_path / "a.pt").read()


def test_optimizer_states_of_an_unknown_form_are_left_out(tmp_path: Path, golden: Path) -> None:
    from libneox.checkpoint.neox.optimizer import read_state

    shutil.copytree(golden / "model/ckpts/pythia_pp0_tp1/ckpt", tmp_path / "ckpt", copy_function=shutil.copyfile)
    checkpoint = open_neox(tmp_path / "ckpt")
    torch.save({"optimizer_state_dict": {"param_slice_mappings": [{}]}}, _zero_file(checkpoint.files.directory))
    assert "unknown form" in str(read_state(checkpoint))


def _zero_file(step: Path) -> Path:
    for path in step.glob("*zero_pp_rank*"):
        path.unlink()
    return step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def test_layers_without_tensors_are_bad_data(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "layer_00-model_00-model_states.pt")
    config = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 8}
    with pytest.raises(DataError, match="word_embeddings"):
        open_neox(tmp_path, config=[config])


def test_a_tensor_cannot_reach_past_its_storage(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(8.0)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    # the size of the tensor, then that of its storage
    for old, new in ((b"K\x08\x85", b"K\x40\x85"), (b"K\x08t", b"K\x7ft")):
        assert members[pickled].count(old) == 1
        changed = members | {pickled: members[pickled].replace(old, new)}
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            for name, data in changed.items():
                archive.writestr(name, data)
        with pytest.raises(DataError, match=r"b\.pt"):
            TorchFile(tmp_path / "b.pt").read()["a"].load()
