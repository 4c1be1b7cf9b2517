# SPDX-License-Identifier: Apache-2.0
"""Messages become the ids of the text that transformers renders; special tokens of the template are tokens."""

from __future__ import annotations

import pytest

from libneox.errors import DataError, UsageError
from libneox.tokenizer import byte_tokenizer
from neox_gen.loading import Loaded

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}
[{{ message.role }}] {{ message.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
]


def loaded(template: str | None) -> Loaded:
    return Loaded(None, byte_tokenizer(), template=template, special={"bos_token": "<|endoftext|>"})  # type: ignore[arg-type]


def test_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = byte_tokenizer()
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    rendered, _ = render_jinja_template([MESSAGES], chat_template=TEMPLATE, add_generation_prompt=True, **names)
    ids = loaded(TEMPLATE).chat_ids(MESSAGES)
    assert tokenizer.decode(ids) == rendered[0]
    assert ids[0] == 0  # special tokens of the template are tokens


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no chat template"):
        loaded(None).chat_ids(MESSAGES)
    with pytest.raises(DataError, match="no system here"):
        loaded(TEMPLATE).chat_ids([{"role": "system", "content": "x"}])
    with pytest.raises(DataError, match="not a valid chat template"):
        loaded("{% for %}").chat_ids(MESSAGES)
    with pytest.raises(DataError, match="fails on this conversation"):
        loaded("{{ ''.__class__.__mro__[1].__subclasses__() }}").chat_ids(MESSAGES)
