# SPDX-License-Identifier: Apache-2.0
"""Chat templates do what transformers' do, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from libneox.chat import ChatTemplate, named_tokens, read_settings, read_templates
from libneox.errors import DataError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def render(source: str, talk: list[dict[str, str]] = TALK, *, prompt: bool = False, **names: str) -> str:
    return ChatTemplate(source, names, "model").render(talk, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}", "<s>user=hi;assistant=yo;"),
        ("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", "hi\nyo\n"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "yo"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hi"}'),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_what_templates_may_use(source: str, text: str) -> None:
    assert render(source, bos_token="<s>") == text


def test_it_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{{- bos_token }}\n{%- for m in messages %}\n    {%- if m['role'] == 'user' %}\n"
        "        {{- '[U] ' + m['content'] }}\n"
        "    {%- else %}\n        {{- '[A] ' + m['content'] | trim }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '[A] ' }}\n{%- endif %}"
    )
    for prompt in (False, True):
        compiled = transformers._compile_jinja_template(source)
        expected = compiled.render(messages=TALK, add_generation_prompt=prompt, bos_token="<s>")
        assert render(source, prompt=prompt, bos_token="<s>") == expected


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_refusals_name_the_model(source: str) -> None:
    with pytest.raises(DataError, match="model: the chat template fails"):
        render(source)


def test_broken_templates_are_named() -> None:
    with pytest.raises(DataError, match="model: not a valid chat template"):
        ChatTemplate("{% for %}", {}, "model")


def test_settings_of_a_directory(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == {}
    settings = {"eos_token": {"content": "</s>"}, "bos_token": "<s>", "pad_token": None, "chat_template": "one"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path) == settings
    assert named_tokens(settings) == {"eos_token": "</s>", "bos_token": "<s>"}
    assert read_templates(tmp_path, settings) == {"default": "one"}
    several = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    assert read_templates(tmp_path, {"chat_template": several}) == {"default": "a", "tools": "b"}
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_templates(tmp_path, settings) == {"default": "file"}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="tokenizer_config.json"):
        read_settings(tmp_path)


@pytest.mark.parametrize("template", [5, [{"name": "default"}], ["text"], [{"name": "default", "template": 5}]])
def test_templates_that_are_none_are_bad_data(tmp_path: Path, template: object) -> None:
    with pytest.raises(DataError, match="chat"):
        read_templates(tmp_path, {"chat_template": template})


def test_settings_that_are_no_object(tmp_path: Path) -> None:
    for text in ("[1]", "{", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with pytest.raises(DataError, match="tokenizer_config"):
            read_settings(tmp_path)
