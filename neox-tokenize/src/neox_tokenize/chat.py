# SPDX-License-Identifier: Apache-2.0
"""Conversations to tokens and labels through a chat template: data for SFT, KTO, reward models and preferences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from libneox.chat import ChatTemplate, named_tokens, read_settings, read_template, read_templates
from libneox.errors import DataError, InputMissing, UsageError
from libneox.stream import NO_LOSS, TokenBatch
from libneox.tokenizer import JsonTokenizer, Tokenizer
from neox_tokenize.blocks import Block
from neox_tokenize.encode import Encoded
from neox_tokenize.records import BadRecord, Reader, Reject, nothing_in, rejected

if TYPE_CHECKING:
    import numpy as np

LARGEST_REWARD = 3.4e38  # of float32


@dataclass(frozen=True)
class ChatRules:
    """Which tokens of a conversation are trained on.

    Attributes:
        generation_role: the loss is on what this role says.
        only_last: and of that only the conversation's last turn.
        mask: off, every token has its loss.
        reward_model: no loss but on a second end token, where the reward is read.
        reward_key: a number or boolean of each record, written beside the tokens.
        binary_reward: true is 1, false is -1.
        neox: cut turns by the number of tokens, as GPT-NeoX did, although tokens may join across a turn's border.
    """

    generation_role: str = "assistant"
    only_last: bool = False
    mask: bool = True
    reward_model: bool = False
    reward_key: str | None = None
    binary_reward: bool = False
    neox: bool = False


@dataclass(frozen=True)
class ChatEncoder:
    """Encode the conversations of one or several keys: tokens and labels, and rewards if asked for.

    Special tokens in the rendered text become their ids: the template's own marks are such tokens.
    """

    reader: Reader
    tokenizer: JsonTokenizer
    template: ChatTemplate
    rules: ChatRules
    keys: tuple[str, ...]
    eos_id: int

    def __call__(self, block: Block) -> Encoded:
        wanted = [*self.reader.rules.keys, *([self.rules.reward_key] if self.rules.reward_key else [])]
        columns: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self.keys]
        rewards: list[float] = []
        sizes: list[int] = []
        rejects: list[Reject] = []
        for index, values in enumerate(self.reader.values(block, wanted)):
            row = values if isinstance(values, Reject) else self._row(block, index, values)
            if isinstance(row, Reject):
                rejects.append(replace(row, before=len(sizes)))
                continue
            reward, conversations = row
            rewards.append(reward)
            record = block.records[index]
            sizes.append(len(record) if isinstance(record, bytes) else 0)
            for column, item in zip(columns, conversations, strict=True):
                column.append(item)
        batches = [self._batch(column, rewards, key) for key, column in zip(self.keys, columns, strict=True)]
        return Encoded(batches, rejects, sizes)

    def _row(
        self, block: Block, index: int, values: list[Any]
    ) -> tuple[float, list[tuple[np.ndarray, np.ndarray]]] | Reject:
        """The reward of a record, and the tokens and labels of its conversations."""
        try:
            reward = self._reward(values.pop()) if self.rules.reward_key else 0.0
            if all(value == [] for value in values) and not self.rules.neox:
                return nothing_in(block, index, "empty document")
            return reward, [self._conversation(self._messages(value)) for value in values]
        except BadRecord as error:
            return rejected(block, index, error)

    def _batch(self, column: list[tuple[np.ndarray, np.ndarray]], rewards: list[float], key: str) -> TokenBatch:
        import numpy as np

        empty = np.zeros(0, dtype=np.int32)
        return TokenBatch(
            np.concatenate([empty, *(ids for ids, _ in column)]),
            np.array([len(ids) for ids, _ in column], dtype=np.int64),
            np.concatenate([empty, *(labels for _, labels in column)]),
            np.array(rewards, dtype=np.float32) if self.rules.reward_key else None,
            key=key,
        )

    def _messages(self, value: Any) -> list[Mapping[str, Any]]:
        if not isinstance(value, list) or not all(isinstance(m, Mapping) and "role" in m for m in value):
            raise BadRecord("no conversation", "a list of messages with role and content expected")
        return value

    def _conversation(self, messages: list[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [n] and labels int32 [n] of one conversation, its end token included."""
        import numpy as np

        by_count = self.rules.neox and not self.rules.reward_model  # for those the original encoded the whole at once
        ids, turns = self._turns_neox(messages) if by_count else self._turns(messages)
        labels = np.full(len(ids), NO_LOSS, dtype=np.int32)
        last = len(messages) - 1
        for turn, (start, end) in enumerate(turns):
            speaks = messages[turn]["role"] == self.rules.generation_role
            if not self.rules.mask or (speaks and (turn == last or not self.rules.only_last)):
                labels[start:end] = ids[start:end]
        tail = [self.eos_id]
        tail_labels = [self.eos_id if len(labels) and labels[-1] != NO_LOSS else NO_LOSS]
        if self.rules.reward_model:
            labels[:] = NO_LOSS
            tail, tail_labels = [self.eos_id, self.eos_id], [NO_LOSS, self.eos_id]
        joined = np.concatenate([ids, np.array(tail, dtype=np.int32)])
        return joined, np.concatenate([labels, np.array(tail_labels, dtype=np.int32)])

    def _prefixes(self, messages: list[Mapping[str, Any]]) -> list[str]:
        """The rendered text up to each turn, the next turn's opening included where that is generated."""
        role = self.rules.generation_role
        following = [message["role"] == role for message in messages[1:]] + [False]
        try:
            texts = [
                self.template.render(messages[: turn + 1], add_generation_prompt=following[turn])
                for turn in range(len(messages))
            ]
        except DataError as error:
            raise BadRecord("template refuses", str(error)) from error
        return [self.reader.clean(text) for text in texts]

    def _turns(self, messages: list[Mapping[str, Any]]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Ids of the whole text, and each turn's range: a token belongs to the turn in which it starts."""
        import numpy as np

        if not messages:  # the other conversation of the record is not empty
            return np.zeros(0, dtype=np.int32), []
        prefixes = self._prefixes(messages)
        for turn, (before, after) in enumerate(zip(prefixes, prefixes[1:], strict=False)):
            if not after.startswith(before):
                raise BadRecord(
                    "template changes the past",
                    f"with turn {turn + 2} the template renders the turns before it differently, "
                    "so it cannot be told which tokens are whose",
                )
        backend = self.tokenizer.backend(allow_special=True)
        encoding = backend.encode(prefixes[-1], add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        bounds = [0, *(int(np.searchsorted(starts, len(prefix))) for prefix in prefixes[:-1]), len(starts)]
        return np.array(encoding.ids, dtype=np.int32), list(zip(bounds, bounds[1:], strict=False))

    def _turns_neox(self, messages: list[Mapping[str, Any]]) -> tuple[np.ndarray, list[tuple[int, int]]]:
        import numpy as np

        ids: list[int] = []
        turns = []
        for prefix in self._prefixes(messages):
            encoded = self.tokenizer.encode(prefix, allow_special=True, add_special_tokens=False)
            turns.append((len(ids), max(len(encoded), len(ids))))
            ids += encoded[len(ids) :]
        return np.array(ids, dtype=np.int32), turns

    def _reward(self, value: Any) -> float:
        if self.rules.binary_reward and self.rules.neox:
            return 1.0 if value else -1.0
        if not isinstance(value, int | float) or not abs(value) <= LARGEST_REWARD:  # nor NaN
            raise BadRecord("no reward", f"{self.rules.reward_key!r} is {value!r}, not a number")
        return float(value) if not self.rules.binary_reward else 1.0 if value else -1.0


def load_template(tokenizer_source: str, given: str | None) -> tuple[ChatTemplate, str | None]:
    """The chat template, and the name of the end token that its settings declare.

    Args:
        tokenizer_source: where the tokenizer is; the settings and template of its directory are used.
        given: a file with the template itself, which wins.
    Raises:
        InputMissing, DataError: there is none, or it is damaged.
    """
    path = Path(tokenizer_source)
    directory = path if path.is_dir() else path.parent
    settings = read_settings(directory) if path.exists() else {}  # nothing lies beside a built-in tokenizer
    names = named_tokens(settings)
    if given is not None:
        try:
            source, origin = read_template(Path(given)), given
        except OSError as error:
            raise InputMissing(f"{given}: {error.strerror}") from error
    else:
        templates = read_templates(directory, settings) if path.exists() else {}
        source, origin = templates.get("default", ""), str(directory)
        if not source:
            raise InputMissing(f"{origin}: no chat_template beside the tokenizer; --chat-template FILE gives one")
    return ChatTemplate(source, names, origin), names.get("eos_token")


def chat_encoder(
    tokenizer: Tokenizer,
    source: str,
    reader: Reader,
    rules: ChatRules,
    keys: tuple[str, ...],
    template: str | None,
    eos_id: int | None,
) -> ChatEncoder:
    """Put together what `--chat` needs.

    Args:
        source: where the tokenizer is, and with it the template, unless `template` names a file.
        eos_id: the id at the end of a conversation, if it is not to be the declared one.
    Raises:
        UsageError: the tokenizer is no tokenizer.json, or has no end token.
    """
    if not isinstance(tokenizer, JsonTokenizer):
        raise UsageError(f"--chat needs a tokenizer.json; {tokenizer.name} is of kind {tokenizer.kind}")
    loaded, eos_name = load_template(source, template)
    if eos_id is None:
        eos_id = tokenizer.token_id(eos_name) if eos_name else tokenizer.eod_id
    if eos_id is None:
        raise UsageError(f"{tokenizer.name}: no end token for the end of a conversation; --eod names it")
    return ChatEncoder(reader, tokenizer, loaded, rules, keys, eos_id)
