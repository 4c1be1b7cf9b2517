# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments, the same command again each time: `python tests/bench/kills.py --kills 30 --ranks 2`.

Every process of the run is killed at once, whatever it does: importing, reading a checkpoint, training, in the middle
of a save. Steps take some 50 ms and every second one is saved, so many kills hit a save. Exits 1 unless losses,
gradient norms and learning rates of every step and the bytes of the last checkpoint equal the uninterrupted run's.
Asserts identity, not speed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from libneox import run_directory
from libneox.data.manifest import TokenizerRecord
from libneox.data.writer import DatasetWriter
from libneox.tokenizer import load_tokenizer

CONFIG: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "seq_length": 128,
    "max_position_embeddings": 128,
    "pos_emb": "rotary",
    "train_batch_size": 4,
    "train_iters": 200,
    "checkpoint_factor": 2,
    "keep_last_n_checkpoints": 3,
    "hidden_dropout": 0.1,
    "eval_iters": 0,
    "split": "1,0,0",
    "optimizer": {"type": "adam", "params": {"lr": 0.002, "betas": [0.9, 0.95], "eps": 1e-8}},
    "zero_optimization": {"stage": 1},
}


class Command:
    """neox-train on some ranks of this host, all in one process group of their own."""

    def __init__(self, config: Path, ranks: int, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.started = time.monotonic()
        self._processes: list[subprocess.Popen[bytes]] = []
        with open(log, "ab") as stderr:
            for rank in range(ranks):
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
                env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "neox_train", str(config), "-q"],
                        env=env | ({key: str(value) for key, value in place.items()} if ranks > 1 else {}),
                        stdout=subprocess.DEVNULL,
                        stderr=stderr,
                        process_group=self._processes[0].pid if rank else 0,
                    )
                )

    def wait(self, seconds: float) -> list[int] | None:
        """The exit codes if all end within so many seconds."""
        deadline = self.started + seconds
        while any(process.poll() is None for process in self._processes):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.002)
        return [process.returncode for process in self._processes]

    def kill(self) -> None:
        """SIGKILL to the group."""
        os.killpg(self._processes[0].pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def make_data(prefix: Path) -> None:
    """The library's own tests' kind of text, in bytes."""
    tokenizer = load_tokenizer("bytes")
    text = inspect.getsource(subprocess) + inspect.getsource(argparse)
    pieces = [text[i : i + 500] for i in range(0, len(text), 500)]
    documents = [np.array([*ids, tokenizer.eod_id], np.uint16) for ids in tokenizer.encode_batch(pieces)]
    record = TokenizerRecord(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id)
    with DatasetWriter(prefix, "uint16", tokenizer=record, tokenizer_data=tokenizer.data) as writer:
        writer.add(np.concatenate(documents), np.array([len(d) for d in documents]))
        writer.commit(command=["kills"])


def write_config(folder: Path, name: str, changes: dict[str, Any]) -> tuple[Path, Path]:
    """(configuration, run directory)."""
    run, path = folder / name, folder / f"{name}.yml"
    path.write_text(json.dumps(CONFIG | changes | {"data_path": str(folder / "text"), "save": str(run)}))
    return path, run


def numbers(run: Path) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["grad_norm"], record["lr"]) for record in records]


def last_step(run: Path) -> dict[str, bytes]:
    """Files of the last checkpoint that hold no paths."""
    step = run_directory.step_path(run, run_directory.list_steps(run)[-1])
    return {p.name: p.read_bytes() for p in step.iterdir() if p.name not in ("config.yml", "manifest.json")}


class Watched:
    """How far a command got in a run directory since it was started."""

    def __init__(self, run: Path):
        steps = run_directory.list_steps(run)
        self._run, self._first = run, steps[-1] if steps else 0
        self._file = self._inode()

    def _inode(self) -> int:
        path = self._run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    @property
    def trains(self) -> bool:
        """Whether it did a step: metrics.jsonl is another file once it was cut, and longer after a step."""
        return self._inode() != self._file and lines(self._run) > self._first

    def interrupted(self) -> str:
        """What a kill interrupted."""
        if list(self._run.glob("step_*.tmp-pruned-*")):
            return "deleting an old step"
        if list(self._run.glob("step_*.tmp-*")):
            return "in a save"
        return "in a step" if self.trains else "starting"


def lines(run: Path) -> int:
    """Complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> int:
    """Kill, run again, compare; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="change the configuration")
    options = parser.parse_args()
    changes = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.set)}
    with tempfile.TemporaryDirectory() as name:
        return experiment(Path(name), options.kills, options.ranks, random.Random(options.seed), changes)


def experiment(folder: Path, kills: int, ranks: int, chosen: random.Random, changes: dict[str, Any]) -> int:
    """The uninterrupted run, then runs with `kills` kills in all."""
    make_data(folder / "text")
    config, whole = write_config(folder, "whole", changes)
    log = folder / "log"
    command = Command(config, ranks, log)
    while not lines(whole):
        if command.wait(0) is not None:
            print(log.read_text(), file=sys.stderr)
            return 1
        time.sleep(0.01)
    start_up = time.monotonic() - command.started
    if command.wait(math.inf) != [0] * ranks:
        print(log.read_text(), file=sys.stderr)
        return 1
    training = time.monotonic() - command.started - start_up
    print(
        f"{len(numbers(whole))} steps, {ranks} rank(s), start {start_up:.1f} s, training {training:.1f} s", flush=True
    )
    config, run = write_config(folder, "killed", changes)
    done, finished, wrong, met = 0, 0, 0, Counter[str]()
    while done < kills or finished == 0 or run.exists():
        watched = Watched(run)
        command = Command(config, ranks, log)
        if done >= kills:
            codes = command.wait(math.inf)
        elif chosen.random() < 0.25:  # while it starts
            codes = command.wait(chosen.uniform(0, start_up))
        else:
            while (codes := command.wait(0)) is None and not watched.trains:
                time.sleep(0.002)
            codes = codes or command.wait(time.monotonic() - command.started + chosen.uniform(0, training / 8))
        if codes is None:
            after = time.monotonic() - command.started
            command.kill()
            done += 1
            what = watched.interrupted()
            met[what] += 1
            steps = run_directory.list_steps(run)
            print(
                f"kill {done:>3}  after {after:5.2f} s  {what:<22} last step {steps[-1] if steps else '-'}", flush=True
            )
            continue
        finished += 1
        same = [codes == [0] * ranks, numbers(run) == numbers(whole), last_step(run) == last_step(whole)]
        same.append(not list(run.glob("*.tmp-*")))
        wrong += not all(same)
        print(f"run {finished} is complete: exit codes, numbers of every step, last checkpoint, no debris: {same}")
        shutil.rmtree(run)
    print(f"{done} kills ({', '.join(f'{count} {what}' for what, count in met.most_common())}), {finished} runs")
    print("all bit-identical to the uninterrupted run" if not wrong else f"{wrong} runs DIFFER")
    if wrong:
        print(log.read_text()[-4000:], file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
