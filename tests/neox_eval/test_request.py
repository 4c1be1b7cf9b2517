# SPDX-License-Identifier: Apache-2.0
"""What an evaluation is identified by, and what is refused before it begins."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from libneox.errors import UsageError
from neox_eval.evaluation import _translated_errors
from neox_eval.request import ModelRequest, Request
from neox_eval.scoring import Limits, Question, plan
from neox_eval.tasks import local_files


def test_task_files_and_their_data_count_by_content(tmp_path: Path) -> None:
    """Also of several tasks in one option, of a folder of them, and of the data they name."""
    first, second, data = tmp_path / "a.yaml", tmp_path / "more" / "b.yaml", tmp_path / "d.jsonl"
    second.parent.mkdir()
    for path in (first, second, data):
        path.write_text("1")
    request = Request(tasks=[f"{first},{second.parent}", "by_name"])
    specs = ["by_name", {"task": "a", "dataset_kwargs": {"data_files": {"test": [str(data), "far://away"]}}}]

    def fingerprint() -> str:
        return request.fingerprint("model", ModelRequest(), local_files(request.names, specs))

    seen = {fingerprint()}
    for path in (first, second, data):
        path.write_text("2")
        seen.add(fingerprint())
    assert len(seen) == 4
    assert fingerprint() in seen


def test_what_changes_the_answers_changes_the_fingerprint(tmp_path: Path) -> None:
    samples = tmp_path / "s.json"
    samples.write_text(json.dumps({"t": [1]}))
    same = [Request(tasks=["a,b"], seed="7"), Request(tasks=["a", "b"], seed="7,7,7,7")]
    others = [Request(tasks=["a"]), Request(tasks=["a"], samples=str(samples)), Request(tasks=["a"], limit=3)]
    model, faster = ModelRequest(), ModelRequest(batch_size="9", device="cpu", tensor_parallel=2)
    assert len({request.fingerprint("m", how, ()) for request in same for how in (model, faster)}) == 1
    assert len({request.fingerprint("m", model, ()) for request in [*same, *others]}) == 4
    assert others[0].fingerprint("m", ModelRequest(dtype="float32"), ()) != others[0].fingerprint("m", model, ())
    before = others[1].fingerprint("m", model, ())
    samples.write_text(json.dumps({"t": [2]}))
    assert Request(tasks=["a"], samples=str(samples)).fingerprint("m", model, ()) != before


def test_a_metric_that_overflows_is_no_bug_of_ours() -> None:
    with pytest.raises(UsageError, match="OverflowError"), _translated_errors():
        math.exp(1000)


def test_no_batch_has_more_rows_than_asked_for() -> None:
    questions = [Question(i, (1, 2, i // 5), (3,) * (1 + i % 5)) for i in range(20)]
    for rows in (1, 2, 3, 64):
        batches = list(plan(questions, Limits(tokens=1 << 20, rows=rows)))
        assert sorted(q.index for batch in batches for group in batch.groups for q in group) == list(range(20))
        assert max(sum(map(len, batch.groups)) for batch in batches) <= rows
