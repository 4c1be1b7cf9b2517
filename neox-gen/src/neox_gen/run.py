# SPDX-License-Identifier: Apache-2.0
"""The work of `neox-gen CKPT`: prompts in, completions out, each as soon as it and all before it are there."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from libneox.cli import warn
from libneox.errors import DataError
from libneox.files import open_input
from neox_gen.loading import Loaded, load
from neox_gen.options import PROG, Options, Working
from neox_gen.prompts import Prompt, batches, json_line, read_prompts

WATCH_EVERY_S = 0.05
SHARE_AFTER_S = 1.0  # of decoding; measuring the memory's bandwidth would take a shorter run as long again


def generate_all(checkpoint: Path, file: Path, stdout: BinaryIO, *, options: Options, working: Working) -> None:
    """Load the model and complete everything asked for."""
    if options.interactive:
        from neox_gen.interactive import talk

        talk(checkpoint, stdout, options=options, working=working)
        return
    if options.number:
        nothing = (Prompt(content="", where=f"text {i + 1}") for i in range(options.number))
        prompts: Iterator[Prompt] = nothing
    else:
        name = "stdin" if str(file) == "-" else str(file)
        stream = open_input(file)  # before the model is loaded: what is missing is said at once
        prompts = read_prompts(stream, format=options.format, prompt_end=options.prompt_end, name=name)
    Run(options, working, load(checkpoint, working, PROG), stdout).complete(prompts)


def make_engine(options: Options, loaded: Loaded, on_step: Any = None) -> Any:
    """An engine with the options given, else the checkpoint's own settings, else greedy and 64 tokens."""
    from libneox.generation import Engine, Sampling

    def chosen(given: Any, key: str, otherwise: Any) -> Any:
        return given if given is not None else loaded.settings.get(key, otherwise)

    sampling = Sampling(
        temperature=chosen(options.temperature, "temperature", 0.0),
        top_k=chosen(options.top_k, "top_k", 0),
        top_p=chosen(options.top_p, "top_p", 0.0),
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
    )
    return Engine(
        loaded.model,
        loaded.tokenizer,
        sampling=sampling,
        max_tokens=chosen(options.max_tokens, "maximum_tokens", 64),
        stop=options.stop or (),
        logprobs=options.logprobs,
        guesses=options.guess,
        end_ids=loaded.end_ids,
        on_step=on_step,
    )


class Run:
    """One pass over the prompts."""

    def __init__(self, options: Options, working: Working, loaded: Loaded, stdout: BinaryIO):
        self._options, self._working, self._stdout, self._loaded = options, working, stdout, loaded
        self._watched = _Watch(stdout)
        self._engine = make_engine(options, loaded, self._watched.check)
        self._count = self._skipped = 0

    def complete(self, prompts: Iterator[Prompt]) -> None:
        """Complete all prompts and say on stderr how fast it went."""
        options = self._options
        size = 1 if options.text or options.guess else max(1, self._working.batch_size // options.num_return)
        started, seen = time.perf_counter(), 0
        for batch in batches(prompts, size):
            self._complete_batch(batch, seen)
            seen += len(batch)
        if not options.quiet:
            self._report(time.perf_counter() - started)

    def _complete_batch(self, batch: list[Prompt], first: int) -> None:
        requests, failed = [], {}
        for place, prompt in enumerate(batch):
            try:
                requests.append(self._request(prompt, first + place))
            except DataError as error:
                if not self._working.skip:
                    raise DataError(f"{prompt.where}: {error}") from error
                failed[place] = str(error)
        results = iter(self._engine.run(requests, self._stream_text if self._options.text else None))
        for place, prompt in enumerate(batch):
            if place in failed:
                self._skipped += 1
                self._write(prompt, _failure(prompt, failed[place]))
                continue
            for _ in range(self._options.num_return):
                self._count += 1
                self._write(prompt, self._record(next(results)))

    def _request(self, prompt: Prompt, index: int) -> Any:
        content: Any = prompt.content
        if prompt.is_chat:
            content = self._loaded.chat_ids(content)
        return self._engine.request(content, index=index, copies=self._options.num_return)

    def _stream_text(self, text: str) -> None:
        if self._options.num_return == 1:
            self._stdout.write(text.encode("utf-8", "replace"))
            self._stdout.flush()

    def _record(self, completion: Any) -> dict[str, Any]:
        record = {
            "context": completion.context,
            "text": completion.text,
            "length": completion.length,
            "finished": completion.finished,
            "message": completion.message,
            "duration_seconds": round(completion.duration_seconds, 6),
            "reason": completion.reason,
        }
        if self._options.ids or self._options.logprobs is not None:
            record["tokens"] = completion.tokens
        if self._options.logprobs is not None:
            record["token_logprobs"] = completion.token_logprobs
            record["top_logprobs"] = completion.top_logprobs
        return record

    def _write(self, prompt: Prompt, record: dict[str, Any]) -> None:
        if self._options.text:
            whole = record["text"] if self._options.num_return > 1 else ""  # else it was streamed already
            self._stdout.write((whole + "\n").encode("utf-8", "replace"))
        else:
            self._stdout.write(json_line({**prompt.extra, **record}, prompt.where))
        self._stdout.flush()

    def _report(self, seconds: float) -> None:
        work = self._engine.work
        line = f"{self._count:,} completions, {work.tokens:,} tokens in {seconds:.1f} s"
        if work.decode_seconds > 0:
            line += f", {work.tokens / work.decode_seconds:,.1f} tokens/s while decoding"
        if work.decode_seconds > SHARE_AFTER_S and work.bytes_read:
            from libneox.generation.bandwidth import measure_bandwidth

            rate, most = work.bytes_read / work.decode_seconds, measure_bandwidth(self._engine.model.device)
            line += f", reading {rate / 1e9:.1f} GB/s: {rate / most:.0%} of the memory's {most / 1e9:.1f} GB/s"
        if self._skipped:
            line += f"; {self._skipped:,} prompts skipped"
        warn(PROG, line)


def _failure(prompt: Prompt, message: str) -> dict[str, Any]:
    return {
        "context": prompt.content, "text": "", "length": 0, "finished": False, "message": message,
        "duration_seconds": 0.0, "reason": "error",
    }  # fmt: skip


class _Watch:
    """Notices that nobody reads our output any more, before the next record is made in vain."""

    def __init__(self, stdout: BinaryIO):
        self._poll = select.poll()
        self._poll.register(stdout.fileno(), 0)  # POLLERR is always reported
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raise BrokenPipeError if stdout is a pipe whose reader has gone."""
        now = time.monotonic()
        if now - self._looked >= WATCH_EVERY_S:
            self._looked = now
            if any(event & select.POLLERR for _, event in self._poll.poll(0)):
                raise BrokenPipeError
