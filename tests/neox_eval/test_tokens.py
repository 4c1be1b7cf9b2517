# SPDX-License-Identifier: Apache-2.0
"""Texts to ids as the harness's hf model makes them, and chats as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libneox.errors import DataError, UsageError
from neox_eval.tokens import HarnessTokens

TEMPLATE = """{%- for message in messages -%}
    {%- if message.role == "narrator" %}{{ raise_exception("no narrators") }}{% endif %}
    {%- if message.role == "assistant" %}
{{ bos_token }}<a>{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
    {%- else %}
<{{ message.role }}>{{ message["content"] }} {{ {"é": 1} | tojson }}
    {%- endif %}
    {%- if loop.index0 > 8 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<a>
{%- endif %}"""
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": " what? "},
    {"role": "assistant", "content": "this "},
]


@pytest.fixture(scope="module")
def folder(hf_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama-shaped tokenizer with a chat template beside it."""
    folder = tmp_path_factory.mktemp("chat")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((hf_models["llama"] / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize(("chat", "reply"), [(CHAT[:2], True), (CHAT, False), (CHAT, True), (CHAT[:1], False)])
def test_chats_equal_transformers(folder: Path, chat: list[dict[str, str]], reply: bool) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tokenize=False, add_generation_prompt=reply, continue_final_message=not reply
    )
    assert HarnessTokens.load(folder).render(chat, reply=reply) == reference


def test_texts_equal_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokens, reference = HarnessTokens.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("plain", "<|endoftext|>begins so", "a<|endoftext|>b", "", " é 雪 ", "<|padding|>x"):
        assert tokens.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
        expected = reference.encode(text, add_special_tokens=not text.startswith("<|endoftext|>"))
        assert tokens.encode(text) == expected
        assert tokens.decode(expected) == reference.decode(expected, skip_special_tokens=True)


def test_templates_that_fail(folder: Path) -> None:
    with pytest.raises(DataError, match="no narrators"):
        HarnessTokens.load(folder).render([{"role": "narrator", "content": "x"}])
    plain = HarnessTokens(HarnessTokens.load(folder).base)
    with pytest.raises(UsageError, match="no chat template"):
        plain.render(CHAT)


def test_templates_by_name(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": "D"}, {"name": "tools", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokens = HarnessTokens.load(tmp_path)
    assert tokens.render(CHAT) == "D"
    assert tokens.render(CHAT, name="tools") == "T"
    with pytest.raises(UsageError, match="default, tools"):
        tokens.template("other")


def test_the_template_asked_for_is_the_one_used(hf_models: dict[str, Path]) -> None:
    """`--chat-template NAME` reaches the prompts, not only the results."""
    from libneox import load_model
    from neox_eval.lm import NeoxLM

    tokens = HarnessTokens.load(hf_models["llama"])
    tokens.templates = {"default": "D", "tools": "T"}
    lm = NeoxLM(model=load_model(hf_models["llama"]), tokenizer=tokens)
    for name, text in ((True, "D"), ("tools", "T"), (True, "D")):
        assert lm.chat_template(name) == lm.apply_chat_template(CHAT) == text
    with pytest.raises(UsageError, match="default, tools"):
        lm.chat_template("other")


def test_templates_run_in_a_sandbox(folder: Path) -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    tokens = HarnessTokens(HarnessTokens.load(folder).base, {}, {"default": escape})
    with pytest.raises(DataError, match="unsafe"):
        tokens.render(CHAT)


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    from libneox.tokenizer import Tokenizer, byte_tokenizer

    document = json.loads(byte_tokenizer().data)
    document["added_tokens"] = []
    document["model"]["vocab"] = {name: i for name, i in document["model"]["vocab"].items() if i > 1}
    bare = Tokenizer.from_bytes("tokenizer.json", json.dumps(document).encode())
    with pytest.raises(DataError, match="eos_token"):
        HarnessTokens(bare)
