# SPDX-License-Identifier: Apache-2.0
"""How work is recorded: on its own device, in the right order, and without drawing random numbers twice.

torch.cuda is a stand-in that writes down what it is asked for; that the numbers are right is for the tests of a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from libneox.model import cuda_graph


def test_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def within(name: str) -> Iterator[None]:
        said.append(f"<{name}>")
        yield
        said.append(f"</{name}>")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            """Nothing runs."""

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    def graph(graph: Graph, *, pool: Any, stream: Stream, capture_error_mode: str) -> contextlib.AbstractContextManager:
        return within(f"capture {pool} {capture_error_mode}")

    fakes = {
        "device": lambda device: within(str(device)), "Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph,
        "stream": lambda stream: within("side"), "graph": graph, "get_rng_state": lambda device: f"state of {device}",
        "set_rng_state": lambda state, device: said.append(f"{state} again"),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device, result = torch.device("cuda", 1), torch.zeros(())
    replay = cuda_graph.record(lambda: said.append("work") or result, lambda: said.append("undo"), device, "pool")
    assert " ".join(said) == (
        "<cuda:1> <side> work undo work undo </side> state of cuda:1 again "
        "<capture pool thread_local> work </capture pool thread_local> undo </cuda:1>"
    )
    said.clear()
    assert replay() is result
    assert said == ["replay"]
