# SPDX-License-Identifier: Apache-2.0
"""Chat templates render as transformers renders them, in a sandbox."""

from __future__ import annotations

import pytest

from libneox.errors import DataError, UsageError
from libneox.tokenizer import byte_tokenizer
from neox_gen.chat import Chat

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


def test_equals_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = byte_tokenizer()
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    rendered, _ = render_jinja_template([MESSAGES], chat_template=TEMPLATE, add_generation_prompt=True, **names)
    ids = Chat(TEMPLATE, tokenizer).ids(MESSAGES)
    assert tokenizer.decode(ids) == rendered[0]
    assert ids[0] == 0  # special tokens of the template are tokens


def test_refusals() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(UsageError, match="no chat template"):
        Chat(None, tokenizer)
    with pytest.raises(DataError, match="no system here"):
        Chat(TEMPLATE, tokenizer).ids([{"role": "system", "content": "x"}])
    with pytest.raises(DataError, match="Jinja"):
        Chat("{% for %}", tokenizer)
    with pytest.raises(DataError, match="refuses"):
        Chat("{{ ''.__class__.__mro__[1].__subclasses__() }}", tokenizer).ids(MESSAGES)
