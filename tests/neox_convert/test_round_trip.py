# SPDX-License-Identifier: Apache-2.0
"""Series H-01 to H-05: round trips give the same bytes, damaged sources are named before anything is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from libneox import load_model
from libneox.checkpoint.store import open_tensors
from libneox.model_config import ModelConfig
from neox_convert import convert
from neox_convert.convert import Options
from neox_convert.look import tensor_sha256
from neox_convert.source import Where

QUIET = Options(verify=False, quiet=True)
# name -> (layers, hidden, heads): the shapes of Pythia; rotary_pct 0.25, 50304 rows
PYTHIA = {
    "70m": (6, 512, 8),
    "160m": (12, 768, 12),
    "410m": (24, 1024, 16),
    "1b": (16, 2048, 8),
    "1.4b": (24, 2048, 16),
}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every stored tensor of a Hugging Face directory."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                found[name] = tensor_sha256(file.get_tensor(name))
    return found


def there_and_back(hf: Path, work: Path) -> Path:
    convert.to_native(Where(kind="hf", path=str(hf)), str(work / "run"), step=None, options=QUIET)
    convert.to_hf(str(work / "run"), str(work / "again"), arch="auto", trim_vocab=False, options=QUIET)
    return work / "again"


SMALL: Mapping[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"residual": "sequential"},
    "tied": {"tie_embeddings": True},
    "sequential_tied_tanh": {"residual": "sequential", "tie_embeddings": True, "activation": "gelu_tanh"},
    "llama_gqa": {
        "residual": "sequential",
        "num_kv_heads": 2,
        "norm": "rmsnorm",
        "activation": "swiglu",
        "rotary_pct": 1.0,
        "qkv_bias": False,
        "attn_out_bias": False,
        "mlp_bias": False,
    },
    "starcoder_gqa": {"residual": "sequential", "num_kv_heads": 2, "rotary_pct": 1.0},
    "falcon_gqa": {"residual": "parallel", "num_kv_heads": 2, "rotary_pct": 1.0},
}


@pytest.mark.parametrize("case", SMALL)
def test_h01_small_models(tmp_path: Path, make_hf: Any, small_config: Any, case: str) -> None:
    hf = make_hf(tmp_path / "hf", small_config(**SMALL[case]))
    again = there_and_back(hf, tmp_path)
    assert hashes(again) == hashes(hf)
    assert json.loads((again / "config.json").read_text()) == json.loads((hf / "config.json").read_text())
    ids = torch.arange(60).reshape(2, 30)
    with torch.inference_mode():
        assert torch.equal(load_model(again)(ids), load_model(hf)(ids))


def _pythia(size: str) -> ModelConfig:
    layers, hidden, heads = PYTHIA[size]
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=4 * hidden,
        vocab_size=258,
        padded_vocab_size=50304,
        seq_length=2048,
        max_position_embeddings=2048,
        residual="parallel",
        rotary_pct=0.25,
    )


@pytest.mark.parametrize("size", ["70m", *(pytest.param(size, marks=pytest.mark.slow) for size in list(PYTHIA)[1:])])
def test_h01_shapes_of_pythia(scratch: Path, make_hf: Any, size: str) -> None:
    hf = make_hf(scratch / "hf", _pythia(size), torch.float16, files=2)
    assert hashes(there_and_back(hf, scratch)) == hashes(hf)


@pytest.mark.parametrize("case", ["parallel", "sequential", "llama_gqa"])
def test_h02_any_layout_of_the_source(tmp_path: Path, make_run: Any, small_config: Any, case: str) -> None:
    """TP 1, 2 and 4, sequential and per-layer files: the same Hugging Face bytes."""
    fields = SMALL[case] | ({"num_kv_heads": 4, "num_heads": 8, "head_dim": 4} if case == "llama_gqa" else {})
    run = make_run(tmp_path / "run", small_config(**fields))
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    wanted = hashes(tmp_path / "hf")
    for ranks in (1, 2, 4):
        for layout in ("pipeline", "sequential"):
            name = f"{layout}{ranks}"
            convert.to_neox(
                str(run),
                str(tmp_path / name),
                tensor_parallel=ranks,
                layout=layout,
                options=Options(quiet=True),
            )
            source = Where(kind="neox", path=str(tmp_path / name))
            convert.to_native(source, str(tmp_path / name / "run"), step=None, options=QUIET)
            output = tmp_path / name / "hf"
            convert.to_hf(str(tmp_path / name / "run"), str(output), arch="auto", trim_vocab=False, options=QUIET)
            assert hashes(output) == wanted, name


def _broken(hf: Path, how: str) -> str:
    """Damage a directory of three files; returns what the message must name."""
    index_path = hf / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    if how == "missing shard":
        (hf / "model-00002-of-00003.safetensors").unlink()
        return "model-00002-of-00003.safetensors"
    if how == "extra key in the index":
        index["weight_map"]["gpt_neox.nothing"] = "model-00002-of-00003.safetensors"
        index_path.write_text(json.dumps(index))
        return "gpt_neox.nothing"
    from safetensors.torch import load_file, save_file

    path = hf / "model-00003-of-00003.safetensors"
    tensors = load_file(path)
    if how == "shape":
        tensors["embed_out.weight"] = tensors["embed_out.weight"][:, :-1].contiguous()
        name = "head.weight"
    elif how == "extra tensor":
        name = "gpt_neox.layers.0.surprise"
        tensors[name] = torch.ones(1)
    else:
        name = "gpt_neox.final_layer_norm.weight"
        del tensors[name], index["weight_map"][name]
        index_path.write_text(json.dumps(index))
    save_file(tensors, path)
    return name


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("missing shard", 66),
        ("extra key in the index", 65),
        ("shape", 65),
        ("extra tensor", 65),
        ("missing tensor", 65),
    ],
)
def test_h03_damaged_sources(
    tmp_path: Path, run_command: Any, make_hf: Any, small_config: Any, how: str, code: int
) -> None:
    from libneox.checkpoint.hf import open_hf
    from libneox.errors import NeoxError

    hf = make_hf(tmp_path / "hf", small_config(), files=3)
    named = _broken(hf, how)
    with pytest.raises(NeoxError) as caught:
        open_hf(hf)
    assert caught.value.exit_code == code
    assert named in str(caught.value)
    with pytest.raises(NeoxError):
        convert.to_native(Where(kind="hf", path=str(hf)), str(tmp_path / "run"), step=None, options=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "quick_gelu"),
        ("intermediate_size", 96),
        ("num_attention_heads", 5),
        ("num_attention_heads", 0),
        ("rope_parameters", {"rope_theta": 10000.0, "partial_rotary_factor": 1.5}),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 10**12),
        ("hidden_size", "32"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    ],
)
def test_h04_config_that_does_not_fit(tmp_path: Path, make_hf: Any, small_config: Any, key: str, value: Any) -> None:
    from libneox.checkpoint.hf import open_hf
    from libneox.errors import DataError

    hf = make_hf(tmp_path / "hf", small_config())
    config = json.loads((hf / "config.json").read_text()) | {key: value}
    config.pop("rope_scaling", None)
    (hf / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError):
        open_hf(hf)


@pytest.mark.parametrize(("key", "value"), [("rotary_pct", 1.0), ("hidden_act", "relu")])
def test_h04_self_check_catches_a_wrong_export(
    tmp_path: Path, make_run: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch, key: str, value: Any
) -> None:
    """An export whose config.json misdescribes the weights is not kept."""
    from libneox.errors import IntegrityError
    from neox_convert import writing

    run = make_run(tmp_path / "run", small_config())
    whole = writing.write_hf

    def wrong(directory: Path, *arguments: Any, **options: Any) -> None:
        whole(directory, *arguments, **options)
        config = json.loads((directory / "config.json").read_text()) | {key: value}
        config["rope_parameters"]["partial_rotary_factor"] = config["rotary_pct"]
        (directory / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(convert, "write_hf", wrong)
    with pytest.raises(IntegrityError, match="differ by at most"):
        convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=Options(quiet=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_h05_output_exists(tmp_path: Path, run_command: Any, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "run", small_config())
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").write_text("x")
    command = ["neox-convert", "to-hf", run, tmp_path / "hf", "--no-verify"]
    assert run_command(command).returncode == 73
    assert (tmp_path / "hf" / "precious").exists()
    done = run_command([*command, "--force"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == f"{tmp_path / 'hf'}\n"
    assert not (tmp_path / "hf" / "precious").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_h05_force_does_not_take_the_source_away(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """The run around a step, with its other steps, is not replaced by what is made of that step."""
    from libneox.errors import OutputExists
    from neox_convert import rewrite

    run = make_run(make_run(tmp_path / "run", small_config(), step=2), small_config())
    force = Options(verify=False, quiet=True, force=True)
    with pytest.raises(OutputExists, match="holds the source"):
        convert.to_hf(str(run), str(run), arch="auto", trim_vocab=False, options=force)
    with pytest.raises(OutputExists, match="holds the source"):
        convert.to_neox(str(run), str(tmp_path), tensor_parallel=1, layout="pipeline", options=force)
    with pytest.raises(OutputExists, match="holds the source"):
        rewrite.rewrite(str(run / "step_2"), str(run), options=force)
    with pytest.raises(OutputExists, match="holds the source"):
        rewrite.average([str(run / "step_2"), str(run / "step_3")], str(run), weights=(), step=None, options=force)
    assert sorted(path.name for path in run.iterdir()) == ["latest", "step_2", "step_3"]
    rewrite.rewrite(str(run / "step_2"), str(run / "step_2"), options=force)  # itself, in place
    assert load_model(run / "step_2").config == load_model(run / "step_3").config


def test_h05_nowhere_to_write(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    from libneox.errors import OutputExists

    run = make_run(tmp_path / "run", small_config())
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "no" / "hf", tmp_path / "file", tmp_path / "file" / "hf", Path("/"), run / ".."):
        with pytest.raises(OutputExists):
            convert.to_hf(str(run), str(output), arch="auto", trim_vocab=False, options=QUIET)


def test_h05_disk_full(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """A limit on file size stands in for a full disk: the old output stays, nothing unfinished is left."""
    run = make_run(tmp_path / "run", small_config(hidden_size=128))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("x")
    program = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "from neox_convert.cli import main\n"
        "main()\n"
    )
    arguments = ["to-hf", str(run), str(tmp_path / "hf"), "--no-verify", "--force"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, timeout=120, check=False)
    assert done.returncode == 74, done.stderr
    assert (tmp_path / "hf" / "old").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


@pytest.mark.slow
def test_h05_killed_at_any_time(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """SIGKILL leaves no output or a whole one, and running the command again gives the bytes of a clean run."""
    run = make_run(tmp_path / "run", small_config(hidden_size=512, padded_vocab_size=20_480))
    command = [sys.executable, "-m", "neox_convert", "to-hf", str(run), "", "--no-verify", "-q"]

    def start(output: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command[:5], str(output), *command[6:]], stdout=subprocess.DEVNULL)

    began = time.monotonic()
    assert start(tmp_path / "clean").wait(120) == 0
    duration = time.monotonic() - began
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "clean").iterdir()}
    for attempt in range(20):
        process = start(tmp_path / "hf")
        time.sleep(duration * (0.5 + 0.026 * attempt))
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        if (tmp_path / "hf").exists():
            assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == wanted
    assert start(tmp_path / "hf").wait(120) in (0, 73)
    assert {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == wanted
    if len(list(tmp_path.glob("hf.tmp-*"))):  # the last killed one is cleared by the next conversion to the same place
        subprocess.run([*command[:5], str(tmp_path / "hf"), "--force", "--no-verify", "-q"], check=True, timeout=120)
    assert not list(tmp_path.glob("hf*.tmp-*"))


def test_killed_converter_is_cleaned_up_after(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """Left-overs of a dead process go; those of a living one stay."""
    run = make_run(tmp_path / "run", small_config())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"hf.tmp-{dead.pid}").mkdir()
    (tmp_path / f"hf.tmp-{os.getppid()}").mkdir()
    (tmp_path / "hf.tmp-mine").mkdir()
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf", f"hf.tmp-{os.getppid()}", "hf.tmp-mine"}


def test_to_native_names_its_output(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    """OUT is a run with one step; called step_N it is that step of the run around it."""
    hf = make_hf(tmp_path / "hf", small_config())
    where = Where(kind="hf", path=str(hf))
    convert.to_native(where, str(tmp_path / "run"), step=7, options=QUIET)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_7"]
    convert.to_native(where, str(tmp_path / "run/step_9"), step=None, options=QUIET)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest", "step_7", "step_9"]
    assert (tmp_path / "run/latest").readlink() == Path("step_9")
    convert.to_native(where, str(tmp_path / "run/step_8"), step=None, options=QUIET)
    assert (tmp_path / "run/latest").readlink() == Path("step_9")  # the newest, not the last made
    first, second = open_tensors(tmp_path / "run/step_7"), open_tensors(tmp_path / "run/step_9")
    assert all(torch.equal(first[name], second[name]) for name in first)
