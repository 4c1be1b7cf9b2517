# SPDX-License-Identifier: Apache-2.0
"""What `--tasks` names: the harness's own tasks, task files, and plain JSONL files that need no task file at all.

A JSONL file becomes a task by the fields of its first line:

    text                                              bits per byte, byte and word perplexity of each text
    question|prompt|context, choices, answer|label    multiple choice: acc, acc_norm; the answer is an index or a choice
    question|prompt|context, continuation|completion  acc (is it the greedy continuation?) and perplexity
    question|prompt|context, answer|target            exact match of what the model writes up to the end of the line
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from libneox.errors import DataError, InputMissing, UsageError

CONTEXTS = ("question", "prompt", "context")
ANSWERS = ("answer", "label", "gold")
CONTINUATIONS = ("continuation", "completion")
TARGETS = ("answer", "target")


def split_names(values: Sequence[str]) -> list[str]:
    """`--tasks a,b --tasks c` as [a, b, c]; a path that exists is taken whole, commas and all."""
    names: list[str] = []
    for value in values:
        names += [value] if Path(value).exists() else [name.strip() for name in value.split(",") if name.strip()]
    return names


def read_specs(names: Sequence[str]) -> tuple[list[str | dict[str, Any]], bool]:
    """Turn names into what the harness loads, and say whether it has to know its own tasks for that.

    Knowing them means reading some fourteen thousand files, ten to twenty seconds; files given by path spare it.

    Raises:
        InputMissing: a path that is not there.
        DataError: a JSONL file whose fields say nothing.
    """
    specs: list[str | dict[str, Any]] = []
    by_name = False
    for name in names:
        path = Path(name)
        if path.suffix == ".jsonl" or name.endswith((".jsonl.gz", ".jsonl.zst", ".json")):
            specs.append(jsonl_task(path))
        elif path.suffix in (".yaml", ".yml"):
            config, needs_names = read_yaml(path)
            specs.append(config)
            by_name |= needs_names
        elif path.is_dir():
            files = sorted(path.glob("*.yaml"))
            if not files:
                raise InputMissing(f"{path}: no task files (*.yaml) in this directory")
            for file in files:
                config, needs_names = read_yaml(file)
                specs.append(config)
                by_name |= needs_names
        elif os.sep in name and not path.exists():
            raise InputMissing(f"{name}: no such task file")
        else:
            specs.append(name)
            by_name = True
    return specs, by_name


def local_files(names: Sequence[str], specs: Sequence[str | dict[str, Any]]) -> list[Path]:
    """The files that tasks given by path are made of: their own, and those of the data they name."""
    found: list[Path] = []
    for path in map(Path, names):
        found += sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    for spec in specs:
        settings = spec.get("dataset_kwargs") if isinstance(spec, dict) else None
        if isinstance(settings, dict):
            found += _data_files(settings.get("data_files"))
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _data_files(value: Any) -> list[Path]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [path for item in value for path in _data_files(item)]
    return [Path(value)] if isinstance(value, str) else []


def read_yaml(path: Path) -> tuple[dict[str, Any], bool]:
    """A task or group file, with data files named relative to it made absolute where they are there.

    Returns:
        The configuration, and whether it names tasks of the harness (a group of them).
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise InputMissing(f"{path}: no such task file")
    try:
        config = load_yaml(path)
    except Exception as error:  # a syntax error, a missing include, a function that cannot be imported
        raise DataError(f"{path}: not a task file: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not ({"task", "group"} & set(config)):
        raise DataError(f"{path}: not a task file: no `task` or `group` in it")
    settings = config.get("dataset_kwargs")
    if isinstance(settings, dict) and "data_files" in settings:
        config["dataset_kwargs"] = {**settings, "data_files": _beside(settings["data_files"], path.parent)}
    members = config.get("task")
    return config, isinstance(members, list) and any(isinstance(member, str) for member in members)


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {key: _beside(value, folder) for key, value in files.items()}
    if isinstance(files, list):
        return [_beside(value, folder) for value in files]
    path = Path(str(files))
    if not path.is_absolute() and not path.exists() and (folder / path).exists():
        return str((folder / path).resolve())
    return str(path.resolve()) if path.exists() else files


def jsonl_task(path: Path) -> dict[str, Any]:
    """A task for a JSONL file, from the fields of its first line (see the module's table)."""
    first = _first_line(path)
    stem = path.name.split(".")[0] or "jsonl"
    task: dict[str, Any] = {
        "task": stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    context = next((name for name in CONTEXTS if name in first), None)
    answer = next((name for name in ANSWERS if name in first), None)
    continuation = next((name for name in CONTINUATIONS if name in first), None)
    target = next((name for name in TARGETS if name in first), None)
    if context and "choices" in first and answer:
        return task | _multiple_choice(context, answer, first[answer])
    if context and continuation:
        return task | {
            "output_type": "loglikelihood",
            "doc_to_text": f"{{{{{context}}}}}",
            "doc_to_target": f"{{{{{continuation}}}}}",
            "target_delimiter": "",
            "metric_list": [
                _mean("acc"),
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    if context and target:
        return task | {
            "output_type": "generate_until",
            "doc_to_text": f"{{{{{context}}}}}",
            "doc_to_target": f"{{{{{target}}}}}",
            "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
            "filter_list": [
                {"name": "strip", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}
            ],
            "metric_list": [_mean("exact_match")],
        }
    if isinstance(first.get("text"), str):
        perplexities = ("bits_per_byte", "byte_perplexity", "word_perplexity")
        return task | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": name} for name in perplexities],
        }
    raise DataError(
        f"{path}: line 1 has the fields {sorted(first)}, which make no task; use text, or one of {'/'.join(CONTEXTS)} "
        f"with choices and {'/'.join(ANSWERS)}, with {'/'.join(CONTINUATIONS)}, or with {'/'.join(TARGETS)}"
    )


def _multiple_choice(context: str, answer: str, example: Any) -> dict[str, Any]:
    by_index = isinstance(example, int) and not isinstance(example, bool)
    return {
        "output_type": "multiple_choice",
        "doc_to_text": f"{{{{{context}}}}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": answer if by_index else f"{{{{choices.index({answer})}}}}",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _first_line(path: Path) -> dict[str, Any]:
    from libneox.files import open_input

    if path.name.endswith((".gz", ".zst", ".json")):
        raise UsageError(f"{path}: name an uncompressed .jsonl file, or a task file that reads this one")
    with open_input(path) as file:
        line = next((line for line in file if line.strip()), b"")
    try:
        first = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line 1 is not JSON ({error})") from error
    if not isinstance(first, dict):
        raise DataError(f"{path}: line 1 is not a JSON object")
    return first
