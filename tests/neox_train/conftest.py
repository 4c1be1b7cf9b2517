# SPDX-License-Identifier: Apache-2.0
"""A tiny corpus, a tiny model, and running neox-train on them as a user would."""

from __future__ import annotations

import filecmp
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from libneox.errors import NeoxError

TINY: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "train_batch_size": 4,
    "train_iters": 8,
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "split": "90,8,2",
    "eval_interval": 1000,
    "eval_iters": 0,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "optimizer": {"type": "adam", "params": {"lr": 0.006, "betas": [0.9, 0.95], "eps": 1e-8}},
    "zero_optimization": {"stage": 1},
    "log_interval": 1,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a dataset: source text of the standard library in bytes, with its tokenizer beside it."""
    from libneox.data.manifest import TokenizerRecord
    from libneox.data.writer import DatasetWriter
    from libneox.tokenizer import load_tokenizer

    prefix = tmp_path_factory.mktemp("corpus") / "text"
    tokenizer = load_tokenizer("bytes")
    text = inspect.getsource(json) + inspect.getsource(subprocess)[:40_000]
    pieces = [text[i : i + 500] for i in range(0, len(text), 500)]
    documents = [np.array([*ids, tokenizer.eod_id], np.uint16) for ids in tokenizer.encode_batch(pieces)]
    record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id)
    with DatasetWriter(prefix, "uint16", tokenizer=record, tokenizer_data=tokenizer.data) as writer:
        writer.add(np.concatenate(documents), np.array([len(d) for d in documents]))
        writer.commit(command=["tests"])
    return prefix


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration: TINY, changed by keyword arguments, `save` being RUN of the test's directory.

    It is trained by DeepSpeed unless the test says stage 0, or which `engine`.
    """

    def write(name: str = "config.yml", **changes: Any) -> Path:
        values = TINY | {"data_path": str(corpus), "save": str(tmp_path / "RUN")} | changes
        if values["zero_optimization"].get("stage", 0) > 0:
            values.setdefault("engine", "deepspeed")  # one rank would do without
        path = tmp_path / name
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return path

    return write


class Finished(subprocess.CompletedProcess[str]):
    """How a command ended."""

    @property
    def lines(self) -> list[str]:
        """Lines of stdout."""
        return self.stdout.splitlines()


@pytest.fixture(scope="session")
def command_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of every command started here."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("extensions")),
        "PATH": "/usr/bin:/bin",  # no compiler of the environment is needed
    }


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Training sets what is faster for a whole process, and tests share one."""
    yield
    if "torch" in sys.modules:
        from libneox.model import attention, cpu_attention, products
        from neox_train import speed

        products.use_onednn()
        cpu_attention.use_tiles(False)
        attention.use_varlen(True)
        speed.put_first("")


Train = Callable[..., Finished]


@pytest.fixture
def train(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Train in this process (`neox-train ARGS`, without the seconds that imports take)."""

    def run(*args: str | Path, code: int = 0) -> Finished:
        words = [str(arg) for arg in args]
        quiet = "-q" in words
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        files = [w for i, w in enumerate(words) if not w.startswith("-") and (i == 0 or words[i - 1] != "--set")]
        monkeypatch.chdir(tmp_path)
        keep_process_group(monkeypatch)
        capfd.readouterr()
        with tempfile.TemporaryFile() as stdout:
            returned, message = in_process(files, settings, stdout, quiet)
            stdout.seek(0)
            printed = stdout.read().decode()
        errors = capfd.readouterr().err + message
        assert returned == code, errors
        return Finished(words, returned, printed, errors)

    return run


def keep_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed remembers the first process group of a process, so that group stays for all tests."""
    import torch.distributed as dist

    from libneox.parallel.group import Group

    begin = Group.start_collectives
    monkeypatch.setattr(Group, "close", lambda self: None)
    monkeypatch.setattr(
        Group, "start_collectives", lambda self, backend: None if dist.is_initialized() else begin(self, backend)
    )


def in_process(files: list[str], settings: list[str], stdout: BinaryIO, quiet: bool) -> tuple[int, str]:
    """Exit code and message of a run in this process."""
    from libneox.config import load_config
    from neox_train.cli import start_training

    try:
        start_training(load_config(files, overrides=settings), stdout, quiet=quiet, step_timeout=60)
    except NeoxError as error:
        return error.exit_code, str(error)
    return 0, ""


@pytest.fixture
def train_apart(command_env: dict[str, str], tmp_path: Path) -> Train:
    """Run neox-train in a process of its own, with torchrun if `ranks` is more than 1."""

    def run(
        *args: str | Path,
        ranks: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        script: Path | None = None,
        timeout: float = 120,
        code: int | None = 0,
    ) -> Finished:
        done = subprocess.run(
            command(args, ranks, script),
            capture_output=True,
            text=True,
            cwd=cwd or tmp_path,
            env={**command_env, **(env or {})},
            timeout=timeout,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, done.stderr
        return Finished(done.args, done.returncode, done.stdout, done.stderr)

    return run


def command(args: Sequence[str | Path], ranks: int = 1, script: Path | None = None) -> list[str]:
    """The command line of neox-train (or of a `script` that changes it) on some ranks of this host."""
    words = ["-m", "neox_train"] if script is None else [str(script)]
    words += [str(arg) for arg in args]
    if ranks == 1:
        return [sys.executable, *words]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *words]


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """A program that is neox-train after some lines of Python have changed it."""

    def write(*lines: str) -> Path:
        path = tmp_path / "changed.py"
        head = "import os, signal, sys, time", "import torch", "from neox_train import cli, loop, saving, session"
        path.write_text("\n".join([*head, *lines, "cli.main()"]))
        return path

    return write


class Started(subprocess.Popen[str]):
    """A command that does not outlive a test that failed."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, error, trace)


@pytest.fixture
def start(command_env: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start neox-train and leave it running."""

    def begin(
        *args: str | Path,
        ranks: int = 1,
        script: Path | None = None,
        more_env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        env = command_env | dict(more_env or {})
        return Started(command(args, ranks, script), **(pipes | {"env": env} | more))

    return begin


@pytest.fixture
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """A run's metrics.jsonl: one object a step, each with what every reader may count on."""

    def read(run: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for record in records:
            assert {"step", "samples", "tokens", "loss", "lr", "grad_norm", "tokens_per_s"} <= set(record)
        return records

    return read


@pytest.fixture
def losses(metrics: Callable[[Path], list[dict[str, Any]]]) -> Callable[[Path], list[float]]:
    """The loss of each step of a run."""
    return lambda run: [record["loss"] for record in metrics(run)]


def same_checkpoint(a: Path, b: Path) -> bool:
    """Whether two steps hold the same bytes, but for paths in their configuration."""
    names = {path.name for path in a.iterdir()} - {"config.yml", "manifest.json"}
    assert names == {path.name for path in b.iterdir()} - {"config.yml", "manifest.json"}
    return filecmp.cmpfiles(a, b, names, shallow=False)[0] == sorted(names) or all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )
