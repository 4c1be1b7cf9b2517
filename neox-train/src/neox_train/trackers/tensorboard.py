# SPDX-License-Identifier: Apache-2.0
"""TensorBoard event files, written without torch's writer, which takes seconds to import."""

from __future__ import annotations

import time
from collections.abc import Mapping

from libneox.config import NeoxConfig


class TensorBoard:
    """See `neox_train.trackers.Tracker`."""

    def __init__(self, config: NeoxConfig, first_step: int):
        """Begin a file in `tensorboard_dir`; readers drop what earlier files there hold from `first_step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(config.log.tensorboard_dir, flush_secs=30)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))
        text = "\n".join(f"    {line}" for line in config.to_yaml().splitlines())  # indented: shown as it is
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, summary=text_pb("config", text)))
        self._writer.flush()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A scalar for each figure."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items() if name != "step"]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self, code: int) -> None:
        """Write what is left."""
        self._writer.close()
