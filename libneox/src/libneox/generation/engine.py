# SPDX-License-Identifier: Apache-2.0
"""The decoding loop: batches of prompts in, completions out.

Prompts of a batch are padded on the left; each row counts its own positions, draws from its own generator and leaves
the batch when it is finished. Suffixes: B rows, T positions, V padded vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from libneox.errors import DataError, UsageError
from libneox.generation.bandwidth import weight_bytes
from libneox.generation.lookup import Lookup
from libneox.generation.prepack import prepacked
from libneox.generation.sampling import Sampling, choose, penalise, text_generator
from libneox.generation.steps import Steps
from libneox.generation.text import TextStream
from libneox.model import KVCache, Transformer

if TYPE_CHECKING:
    from libneox.tokenizer import Tokenizer

OnText = Callable[[str], None]
REPAID_AFTER = 16  # decode steps after which packing the weights has paid for itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to complete."""

    prompt: str
    ids: list[int]
    index: int = 0  # place in the input; keys the random numbers
    copies: int = 1


@dataclasses.dataclass(kw_only=True)
class Completion:
    """What became of a prompt. The first six fields are GPT-NeoX's."""

    context: str
    text: str = ""  # the completion alone
    length: int = 0  # tokens made, an end-of-document token not counted
    finished: bool = False  # by the model or a stop string, not by a limit
    message: str | None = None
    duration_seconds: float = 0.0
    reason: str = "length"  # "eod", "stop", "length" (max_tokens) or "context" (the model's longest text)
    index: int = 0
    copy: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Work:
    """What an engine has done so far."""

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0  # passes of the model after the prompt
    decode_seconds: float = 0.0
    bytes_read: int = 0  # weights and cached keys and values that these passes had to read


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str | Sequence[int]],
    *,
    max_tokens: int = 64,
    num_return: int = 1,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    logprobs: int | None = None,
    **sampling: Any,
) -> list[Completion]:
    """Complete prompts (text or ids) and return the completions in their order, `num_return` for each.

    Args:
        sampling: fields of `Sampling`; none of them: greedy.
    Raises:
        DataError: a prompt leaves no room for a token.
        UsageError: an option is out of range.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    worth = max_tokens * len(texts) >= REPAID_AFTER * batch_size
    engine = Engine(
        model, tokenizer, sampling=Sampling(**sampling), max_tokens=max_tokens, stop=stop, logprobs=logprobs,
        prepack=worth,
    )  # fmt: skip
    requests = [engine.request(prompt, index=i, copies=num_return) for i, prompt in enumerate(texts)]
    rows = max(1, batch_size // num_return)
    batches = [requests[i : i + rows] for i in range(0, len(requests), rows)]
    return [completion for batch in batches for completion in engine.run(batch)]


class Engine:
    """Completes batches of prompts with one model and one set of options.

    Args:
        max_tokens: for each prompt.
        stop: strings that end a text; they are not part of it.
        logprobs: return each token's log probability, and those of this many most likely tokens; None: do not.
        guesses: tokens guessed ahead by prompt lookup when a batch is a single text; changes the speed, not the text.
        prepack: pack the weights where that makes decoding faster.
        end_ids: tokens that end a text besides the tokenizer's end-of-document token, as chat models have.
        on_step: called once a decoding step; may raise to stop.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling | None = None,
        max_tokens: int = 64,
        stop: Sequence[str] = (),
        logprobs: int | None = None,
        guesses: int = 0,
        prepack: bool = True,
        end_ids: Iterable[int] = (),
        on_step: Callable[[], None] | None = None,
    ):
        if max_tokens < 0:
            raise UsageError(f"max-tokens {max_tokens} is negative")
        self.model = prepacked(model) if prepack else model
        self.tokenizer, self.sampling = tokenizer, sampling or Sampling()
        self.max_tokens, self.stop, self.logprobs, self.guesses = max_tokens, list(stop), logprobs, guesses
        self.vocabulary = min(model.config.vocab_size, tokenizer.vocab_size)
        self.end_ids = {*end_ids, tokenizer.eod_id}
        self.longest = model.config.max_position_embeddings
        self.work = Work()
        self._weight_bytes = weight_bytes(model.config, model.dtype)
        self._on_step = on_step or (lambda: None)

    def request(self, prompt: str | Sequence[int], *, index: int = 0, copies: int = 1) -> Request:
        """Encode a prompt; an empty one becomes the end-of-document token, after which documents begin.

        Raises:
            DataError: it leaves no room for a token, or holds ids the tokenizer does not have.
        """
        if isinstance(prompt, str):
            text, ids = prompt, self.tokenizer.encode(prompt)
        else:
            ids = [int(i) for i in prompt]
            text = self.tokenizer.decode(ids)
        if not ids:
            if self.tokenizer.eod_id is None:
                raise DataError("the prompt is empty, and the tokenizer has no end-of-document token to begin with")
            ids = [self.tokenizer.eod_id]
        if len(ids) >= self.longest:
            raise DataError(f"the prompt has {len(ids):,} tokens, the model's context {self.longest:,}; shorten it")
        if max(ids) >= self.model.config.padded_vocab_size:
            raise DataError(f"the prompt holds id {max(ids)}, the model has {self.model.config.padded_vocab_size}")
        return Request(prompt=text, ids=ids, index=index, copies=copies)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], on_text: OnText | None = None) -> list[Completion]:
        """Complete one batch; a request's copies follow each other in the result.

        Args:
            on_text: given certain text of the first row as it comes.
        """
        started = time.perf_counter()
        rows = [Row(self, request, copy) for request in requests for copy in range(request.copies)]
        if on_text is not None and rows:
            rows[0].on_text = on_text
        if rows and max(row.limit for row in rows) > 0:
            cache, logits_BV = self._prefill(requests, max(row.limit for row in rows))
            began = time.perf_counter()
            if len(rows) == 1 and self.guesses:
                self.decode_single(rows[0], cache, logits_BV)
            else:
                self._decode(rows, cache, logits_BV)
            self.work.decode_seconds += time.perf_counter() - began
        self.work.prompt_tokens += sum(len(request.ids) for request in requests)
        return [row.completion(time.perf_counter() - started) for row in rows]

    def _prefill(self, requests: Sequence[Request], new_tokens: int) -> tuple[KVCache, Tensor]:
        """Read the prompts: a cache with a row for every copy, and the logits after each."""
        model = self.model
        lengths = [len(request.ids) for request in requests]
        width = max(lengths)
        ids_BT = torch.zeros(len(requests), width, dtype=torch.int64)
        for row, request in enumerate(requests):
            ids_BT[row, width - lengths[row] :] = torch.tensor(request.ids)
        pad_B = None if min(lengths) == width else torch.tensor([width - n for n in lengths], device=model.device)
        capacity = width + new_tokens + self.guesses
        whole = model.device.type == "cuda" and not self.guesses and model.is_whole and model.attention != "flash"
        cache = KVCache(
            model.config,
            len(requests),
            capacity,
            dtype=cache_dtype(model),
            device=model.device,
            pad_B=pad_B,
            kv_heads=model.kv_heads,
            whole=whole,
        )
        logits_BV = model.logits(model.hidden(ids_BT.to(model.device), cache=cache)[:, -1])
        copies = torch.tensor([request.copies for request in requests])
        if (copies > 1).any():
            rows = torch.arange(len(requests)).repeat_interleave(copies).to(model.device)
            cache.select(rows)
            logits_BV = logits_BV[rows]
        return cache, logits_BV

    def _decode(self, rows: list[Row], cache: KVCache, logits_BV: Tensor) -> None:
        """All rows to their ends.

        A row that has ended leaves the cache. From a `whole` one, whose steps are recorded and would have to be
        recorded again, rows leave when they are at least half of it; until then what they go on with is ignored.
        """
        steps, inside = Steps(self.model, cache), rows
        going = [row.limit > 0 for row in inside]
        chosen_B: Tensor | None = None
        while any(going):
            if not all(going) and (not cache.whole or 2 * sum(going) <= len(going)):
                kept = torch.tensor([i for i, goes in enumerate(going) if goes], device=logits_BV.device)
                inside, going = [row for row, goes in zip(inside, going, strict=True) if goes], [True] * len(kept)
                cache.select(kept)
                steps = Steps(self.model, cache)
                logits_BV = logits_BV[kept]
                chosen_B = None if chosen_B is None else chosen_B[kept]
            if chosen_B is not None:
                self._on_step()
                logits_BV = steps(chosen_B)
                self._count_step(cache)
            chosen_B = self._pick(logits_BV, inside)
            self.work.tokens += sum(going)
            taken = zip(going, inside, chosen_B.tolist(), strict=True)
            going = [goes and row.take(token) for goes, row, token in taken]

    def decode_single(self, row: Row, cache: KVCache, logits_BV: Tensor) -> None:
        """Complete one text; several tokens a pass where it repeats itself, if guessing is on.

        Args:
            cache: holds the row's prompt, and afterwards also its tokens but the last.
            logits_BV: after the prompt.
        """
        lookup = Lookup(row.request.ids, self.guesses)
        logits_TV, guessed = logits_BV, []
        while True:
            for place in range(len(guessed) + 1):
                token = int(self._pick(logits_TV[place : place + 1], [row]))
                self.work.tokens += 1
                lookup.push(token)
                going = row.take(token)
                if not going or place == len(guessed) or token != guessed[place]:
                    break
            cache.truncate(cache.length - len(guessed) + place)  # what was guessed wrongly is forgotten
            if not going:
                return
            guessed = lookup.guess(row.limit - len(row.tokens) - 1)
            self._on_step()
            fed = torch.tensor([[token, *guessed]], device=logits_TV.device)
            logits_TV = self.model(fed, cache=cache)[0]
            self._count_step(cache)

    def _count_step(self, cache: KVCache) -> None:
        self.work.steps += 1
        columns = cache.capacity if cache.whole else cache.length
        self.work.bytes_read += self._weight_bytes + columns * cache.bytes_per_column

    def _pick(self, logits_BV: Tensor, rows: Sequence[Row]) -> Tensor:
        """Choose a token for each row; ids that are only padding of the vocabulary are never chosen."""
        logits_BV = logits_BV[:, : self.vocabulary]
        if self.logprobs is not None:
            self._record(logits_BV, rows)
        adjusted_BV = logits_BV
        if self.sampling.repetition_penalty != 1.0:
            seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
            for i, row in enumerate(rows):
                known = [token for token in (*row.request.ids, *row.tokens) if token < self.vocabulary]
                seen_BV[i, known] = True
            adjusted_BV = penalise(logits_BV, seen_BV, self.sampling.repetition_penalty)
        return choose(adjusted_BV, self.sampling, [row.generator for row in rows])

    def _record(self, logits_BV: Tensor, rows: Sequence[Row]) -> None:
        logprobs_BV = logits_BV.log_softmax(-1)
        best = logprobs_BV.topk(min(self.logprobs or 1, self.vocabulary), dim=-1)
        for i, row in enumerate(rows):
            row.candidates = logprobs_BV[i]
            row.best = list(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True))


def cache_dtype(model: Transformer) -> torch.dtype:
    """Of keys and values: CPUs attend to float32 several times faster than to bfloat16, which they have to convert."""
    return torch.float32 if model.device.type == "cpu" else model.dtype


class Row:
    """The state of one text."""

    def __init__(self, engine: Engine, request: Request, copy: int):
        self.request, self.copy, self._engine = request, copy, engine
        room = engine.longest - len(request.ids)
        self.limit = min(engine.max_tokens, room)
        self._at_limit = "length" if engine.max_tokens <= room else "context"
        self.generator = text_generator(engine.sampling.seed, request.index, copy)
        self.tokens: list[int] = []
        self.on_text: OnText | None = None
        self.candidates: Tensor | None = None
        self.best: list[tuple[int, float]] = []
        self._stream = TextStream(engine.tokenizer, request.ids, engine.stop)
        self._reason: str | None = None
        self._logprobs: list[float] = []
        self._top: list[list[tuple[int, float]]] = []

    def take(self, token: int) -> bool:
        """Add a token; return whether more are wanted."""
        if token in self._engine.end_ids:
            self._reason = "eod"
            self._give(self._stream.finish())
            return False
        if self.candidates is not None:
            self._logprobs.append(self.candidates[token].item())
            self._top.append(self.best[: self._engine.logprobs])
        self.tokens.append(token)
        self._give(self._stream.push(token))
        if self._stream.stopped is not None:
            self._reason = "stop"
        elif len(self.tokens) >= self.limit:
            self._reason = self._at_limit
            self._give(self._stream.finish())
            if self._stream.stopped is not None:
                self._reason = "stop"
        return self._reason is None

    def _give(self, text: str) -> None:
        if text and self.on_text is not None:
            self.on_text(text)

    def completion(self, seconds: float) -> Completion:
        """The result; `seconds` is the time its batch took."""
        reason = self._reason or self._at_limit
        full = f"the text reached the model's context of {self._engine.longest:,} tokens"
        return Completion(
            context=self.request.prompt,
            text=self._stream.text,
            length=len(self.tokens),
            finished=reason in ("eod", "stop"),
            message=full if reason == "context" else None,
            duration_seconds=seconds,
            reason=reason,
            index=self.request.index,
            copy=self.copy,
            tokens=self.tokens,
            token_logprobs=self._logprobs,
            top_logprobs=self._top,
        )
