# SPDX-License-Identifier: Apache-2.0
"""Which GPU a rank has: one of its own, or the run does not begin."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from libneox.errors import UsageError
from neox_train.session import check_devices


def group_of(own: int, everybody: list[list[str]]) -> Any:
    def gather(place: list[str]) -> list[list[str]]:
        assert place == everybody[own]
        return everybody

    return SimpleNamespace(gather=gather)


def test_two_ranks_on_one_gpu_are_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    gpu = torch.device("cuda", 0)
    check_devices(group_of(0, [["a", "1"], ["a", "2"], ["b", "1"]]), gpu)
    check_devices(group_of(1, [["a", ""], ["a", ""]]), torch.device("cpu"))
    for own, places in ((0, [["a", "1"], ["b", "1"], ["a", "1"]]), (1, [["b", "1"], ["a", "1"], ["a", "1"]])):
        ranks = ", ".join(str(rank) for rank, place in enumerate(places) if place == ["a", "1"])
        with pytest.raises(UsageError, match=f"ranks {ranks} have one GPU of a among them"):
            check_devices(group_of(own, places), gpu)
