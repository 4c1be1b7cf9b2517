# SPDX-License-Identifier: Apache-2.0
"""Our scores are those of the harness's own `hf` model on the same directory, question by question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

MODELS = ("pythia", "llama")
KINDS = ("choice", "greedy", "shots", "texts", "write")


@pytest.fixture(scope="module")
def both(
    hf_models: dict[str, Path], task_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Results of ours and of `hf` over all tasks, for each model."""
    import datasets.config
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from neox_eval.lm import NeoxLM
    from neox_eval.tasks import read_specs

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        manager = TaskManager(include_defaults=False)
        for name, folder in hf_models.items():
            ours, reference = (
                simple_evaluate(
                    model=model,
                    model_args={"pretrained": str(folder)} | more,
                    tasks=read_specs([str(path) for path in task_files.values()])[0],
                    task_manager=manager,
                    batch_size=3,
                    device="cpu",
                    bootstrap_iters=0,
                )
                for model, more in ((NeoxLM(folder, batch_size=7), {}), ("hf", {"dtype": "float32"}))
            )
            found[name] = (ours, reference)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_metrics_equal_to_four_decimals(both: Any, model: str, kind: str) -> None:
    ours, reference = (results["results"][kind] for results in both[model])
    metrics = {name for name, value in reference.items() if isinstance(value, float)}
    assert metrics
    for name in metrics:
        assert ours[name] == pytest.approx(reference[name], rel=2e-5, abs=5e-5), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_every_answer_is_the_same(both: Any, model: str, kind: str) -> None:
    ours, reference = (sorted(results["samples"][kind], key=lambda sample: sample["doc_id"]) for results in both[model])
    assert len(ours) == len(reference) >= 5
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine["arguments"] == theirs["arguments"]
        for answer, expected in zip(mine["resps"], theirs["resps"], strict=True):
            check(answer[0], expected[0])


def check(answer: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert answer == expected
        return
    if isinstance(expected, tuple | list):
        assert answer[1] == expected[1], "greedy or not"
        answer, expected = answer[0], expected[0]
    assert answer == pytest.approx(expected, abs=1e-4)


def test_the_questions_are_hard_enough(both: Any) -> None:
    """Contexts are empty, or cut; some choice ends in a space; what is written is not empty and not all cut at once."""
    for results, _ in both.values():
        samples = results["samples"]
        contexts = [len(str(s["arguments"][0][0]).encode()) for s in samples["choice"]]
        assert min(contexts) == 0
        assert max(contexts) > 2 * 64
        assert any(str(s["arguments"][0][1]).endswith(" ") for s in samples["choice"])
        assert all(str(s["arguments"][0][0]).count("Q: ") == 3 for s in samples["shots"])
        written = [s["resps"][0][0] for s in samples["write"]]
        assert len({len(text) for text in written}) > 1, written
