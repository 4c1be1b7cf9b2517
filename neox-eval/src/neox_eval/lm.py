# SPDX-License-Identifier: Apache-2.0
"""The harness's model interface over a libneox model: `NeoxLM`.

Used by `neox-eval`, and by the harness itself: `neox-eval harness run --model neox --model_args checkpoint=RUN` today,
`lm_eval --model neox` once an lm-eval that looks for plugins is installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from libneox.errors import DataError, UsageError
from libneox.progress import Progress
from neox_eval.answers import AnswerLog
from neox_eval.continuing import Prompt, complete, read_sampling
from neox_eval.loading import load
from neox_eval.ranks import Ranks
from neox_eval.scoring import Limits, Score, score
from neox_eval.tokens import HarnessTokens

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from libneox.model import Transformer

AUTO_ROWS = 256
GENERATED_ROWS = 64
AUTO_TOKENS = {"cpu": 4096, "cuda": 65536}  # of a batch; halved where memory is short


class NeoxLM(TemplateLM):
    """A libneox checkpoint or Hugging Face directory, answering the harness.

    Attributes:
        answers: where answers are kept as they come; may be replaced before the first request.
        batch_sizes: unused by this model, read by the harness.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] | None = None,
        *,
        pretrained: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | HarnessTokens | None = None,
        model: Transformer | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = "auto",
        max_batch_size: int | str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        tensor_parallel: int = 1,
        ranks: Ranks | None = None,
        quiet: bool = False,
    ):
        """Load a model, or take one.

        Args:
            checkpoint: RUN, RUN/step_N or a Hugging Face directory; `pretrained` means the same.
            tokenizer: where to read it instead.
            model: a loaded model; then `tokenizer` is needed.
            device: cpu, cuda or cuda:N; a CUDA device where there is none falls back to cpu.
            dtype: auto (as stored), float32, bfloat16 or float16.
            batch_size: most sequences at once; `auto` limits tokens instead.
            max_length: most tokens the model reads at once; its own limit if None.
            tensor_parallel: so many processes hold one model together (`ranks` says it otherwise).
        """
        super().__init__()
        self.ranks = ranks or Ranks(int(tensor_parallel))
        self._rank, self._world_size = self.ranks.rank, self.ranks.world_size
        source = checkpoint if checkpoint is not None else pretrained
        self.identity = "in memory"
        if model is None:
            if source is None:
                raise UsageError("no checkpoint; give checkpoint=PATH")
            loaded = load(source, device=device, dtype=dtype, tokenizer=tokenizer, ranks=self.ranks)
            model, tokenizer, self.identity = loaded.model, loaded.tokens, loaded.identity
        if not isinstance(tokenizer, HarnessTokens):
            raise UsageError("a model in memory needs its tokenizer")
        self.model, self.tokenizer = model, tokenizer
        self.source = str(source or "in memory")
        self._device = model.device
        known = model.config.max_position_embeddings
        self.max_length = int(max_length or known)
        if model.config.pos_emb == "learned" and self.max_length > known:
            raise UsageError(f"max_length {self.max_length}: the model has learned the positions of {known} tokens")
        self.max_gen_toks = int(max_gen_toks)
        self.limits = _limits(batch_size, max_batch_size, model.device)
        self.batch_sizes: dict[int, int] = {}
        self.answers = AnswerLog()
        self._template: str | None = None  # the chat template's name; None: the default one
        self.quiet = quiet or not self.ranks.is_first

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        tokens = self.tokenizer
        return tokens.eos_token_id if tokens.bos_token_id is None else tokens.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in the harness's caches."""
        return f"{Path(self.tokenizer.base.name).name}-{self.tokenizer.base.fingerprint[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; see `HarnessTokens.encode`."""
        return self.tokenizer.encode(string, add_special_tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        return {
            "model_num_parameters": self.model.config.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": self.identity,
        }

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, would greedy decoding give it) of each (context, continuation)."""
        pairs = [request.args for request in requests]

        def ask(unknown: list[int]) -> Iterator[tuple[int, list[Any]]]:
            for index, result in self._scores([self._ids(*pairs[i]) for i in unknown], "requests", disable_tqdm):
                yield index, [result.logprob, result.greedy]

        results = [(answer[0], answer[1]) for answer in self._answer("loglikelihood", pairs, ask)]
        for pair, result in zip(pairs, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for index, result in self._scores(pairs, "requests", disable_tqdm):
            results[index] = tuple(result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the model reads, each id predicted once."""
        texts = [request.args for request in requests]

        def ask(unknown: list[int]) -> Iterator[tuple[int, float]]:
            windows = [self._windows(texts[i][0]) for i in unknown]
            owner = [index for index, several in enumerate(windows) for _ in several]
            totals, left = [0.0] * len(windows), [len(several) for several in windows]
            yield from ((index, 0.0) for index, count in enumerate(left) if count == 0)
            flat = [window for several in windows for window in several]
            for window, result in self._scores(flat, "windows", disable_tqdm):
                text = owner[window]
                totals[text] += result.logprob
                left[text] -= 1
                if left[text] == 0:
                    yield text, totals[text]

        results: list[float] = self._answer("loglikelihood_rolling", texts, ask)
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", text, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to a stop string, the end of the text or a length."""
        questions = []
        seen: dict[str, int] = {}
        for context, settings in (request.args for request in requests):
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
            # Repeats of a sampled request want several answers; a greedy one has only one.
            nth = seen.get(context, 0) if kwargs["do_sample"] else 0
            seen[context] = nth + 1
            questions.append((context, kwargs, nth))

        def ask(unknown: list[int]) -> Iterator[tuple[int, str]]:
            yield from self._completions([questions[i] for i in unknown], disable_tqdm)

        results: list[str] = self._answer("generate_until", questions, ask)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, result)
        return results

    def _completions(
        self, questions: Sequence[tuple[str, dict[str, Any], int]], quiet: bool
    ) -> Iterator[tuple[int, str]]:
        by_settings: dict[str, list[int]] = {}
        for index, (_, kwargs, _) in enumerate(questions):
            by_settings.setdefault(repr(sorted(kwargs.items(), key=str)), []).append(index)
        with self._progress("completions", len(questions), quiet) as progress:
            for indices in by_settings.values():
                kwargs = dict(questions[indices[0]][1])
                until, length = [text for text in kwargs.pop("until") if text], kwargs.pop("max_gen_toks")
                room = self.max_length - length
                if room <= 0:
                    raise UsageError(f"max_gen_toks {length} leaves no room for a context in {self.max_length} tokens")
                prompts = [Prompt(self._context(questions[i][0])[-room:], questions[i][2]) for i in indices]
                stops = [*until, self.tokenizer.eos_token]
                for at, ids in complete(
                    self.model,
                    self.tokenizer,
                    prompts,
                    stop=stops,
                    max_tokens=length,
                    rows=min(self.limits.rows, GENERATED_ROWS),
                    sampling=read_sampling(kwargs, torch.initial_seed()),
                ):
                    text = postprocess_generated_text(self.tokenizer.decode(ids), stops, None)
                    progress.update(1)
                    yield indices[at], text

    def _context(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _answer(self, method: str, questions: Sequence[Sequence[Any]], ask: Any) -> list[Any]:
        return self.answers.answer(method, questions, ask)

    def _ids(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's split of a text into ids of the context and of the continuation."""
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            prefixed = ids[:1] == [self.prefix_token_id]
            result = (ids[:1], ids[1:]) if prefixed else ([self.prefix_token_id], ids)
        else:
            result = self._encode_pair(context, continuation)
        if not result[1]:
            raise DataError(
                f"nothing to score: the continuation {continuation[:60]!r} adds no token to the context ending in "
                f"{context[-60:]!r}; is a choice of the task empty?"
            )
        return result

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _scores(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], unit: str, quiet: bool
    ) -> Iterator[tuple[int, Score]]:
        with self._progress(unit, len(pairs), quiet) as progress:
            for batch in score(self.model, pairs, max_length=self.max_length, limits=self.limits):
                progress.update(len(batch))
                yield from batch

    def _progress(self, unit: str, total: int, quiet: bool) -> Progress:
        return Progress("neox-eval", unit, total=total, quiet=quiet or self.quiet)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; a template that knows no system message gets the conversation without it."""
        try:
            return self.tokenizer.render(chat_history, name=self._template, reply=add_generation_prompt)
        except DataError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            return self.tokenizer.render(rest, name=self._template, reply=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Choose the template that `apply_chat_template` uses, by name or the default one, and return its text."""
        self._template = chat_template if isinstance(chat_template, str) else None
        return self.tokenizer.template(self._template) if chat_template else None

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of every rank."""
        return self.ranks.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The object of every rank, on rank `dst`."""
        everything = self.ranks.gather(obj)
        return everything if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other ranks."""
        self.ranks.barrier()


def _limits(batch_size: int | str | None, max_batch_size: int | str | None, device: torch.device) -> Limits:
    most = int(max_batch_size) if max_batch_size else AUTO_ROWS
    size = str(batch_size or "auto")
    if size.startswith("auto"):
        return Limits(tokens=AUTO_TOKENS.get(device.type, AUTO_TOKENS["cpu"]), rows=most)
    if not size.isdigit() or int(size) < 1:
        raise UsageError(f"batch size {size!r}: neither a positive number nor auto")
    return Limits(tokens=1 << 62, rows=int(size))
