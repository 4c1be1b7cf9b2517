# SPDX-License-Identifier: Apache-2.0
"""How many characters of text a token stands for, for a perplexity that does not depend on the tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from libneox.model.loss import IGNORE
from libneox.parallel.group import Group
from libneox.tokenizer import Tokenizer
from neox_train.objective import MicroBatch


class Characters:
    """Counts the tokens that have a loss, and the characters of their text; special tokens have none."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._tokens, self._characters = tokenizer, 0, 0

    def counted(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """The same micro-batches."""
        for batch in batches:
            wanted = batch.targets != IGNORE
            if batch.mask is not None:
                wanted &= batch.mask > 0
            for ids, taken in zip(batch.targets.cpu(), wanted.cpu(), strict=True):
                counting = ids[taken].tolist()
                self._tokens += len(counting)
                self._characters += len(self._tokenizer.decode(counting, skip_special_tokens=True))
            yield batch

    def tokens_each(self, group: Group, device: torch.device) -> float:
        """Tokens a character, over all ranks; infinite where there are no characters."""
        tokens, characters = group.sum([float(self._tokens), float(self._characters)], device)
        return tokens / characters if characters else float("inf")
