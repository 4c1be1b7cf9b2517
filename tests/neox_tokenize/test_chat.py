# SPDX-License-Identifier: Apache-2.0
"""Conversations: which tokens are trained on, whatever the template and the tokenizer do at a turn's border."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from libneox.errors import DataError, InputMissing, UsageError
from libneox.tokenizer import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '.' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "bye"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model directory: the byte tokenizer and a chat template."""
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().data)
    config = {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def trained(stream, document: int = 0, key: str = "") -> str:
    """What of a document has a loss, as text."""
    return "".join(
        "$" if label == 0 else chr(label - 2) if label != -100 else "_" for label in stream.labels[key][document]
    )


def test_turns_of_the_generation_role(tokenize, folder: Path) -> None:
    source = json.dumps({"messages": TALK})
    options = {"tokenizer": str(folder), "chat": True}
    stream = tokenize(source, **options)
    assert stream.texts == ["[user]hi.[assistant]yo.[user]ok.[assistant]bye.<|endoftext|>"]
    assert trained(stream) == "_" * 20 + "yo." + "_" * 20 + "bye.$"
    assert trained(tokenize(source, only_last=True, **options)) == "_" * 43 + "bye.$"
    assert trained(tokenize(source, no_mask=True, **options)).startswith("[user]hi.[assistant]yo.")
    model = tokenize(source, for_rm=True, **options)
    assert model.labels[""][0][-2:] == [-100, 0]
    assert set(model.labels[""][0][:-1]) == {-100}


def test_preferences_are_two_columns(tokenize, folder: Path) -> None:
    worse = [*TALK[:1], {"role": "assistant", "content": "no"}]
    source = json.dumps({"chosen": TALK[:2], "rejected": worse, "score": 2})
    stream = tokenize(source, tokenizer=str(folder), chat=True, key=["chosen", "rejected"], reward_key="score")
    assert trained(stream, key="chosen").strip("_") == "yo.$"
    assert trained(stream, key="rejected").strip("_") == "no.$"
    assert stream.rewards == [2.0]


def test_a_token_across_the_border_belongs_to_where_it_starts(tokenize, folder: Path) -> None:
    """A merge of the prompt's last character with the answer's first must not shift the labels of the rest."""
    content = json.loads(byte_tokenizer().data)
    content["model"]["vocab"]["]y"] = 258
    content["model"]["merges"] = [["]", "y"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode("]yo").ids == [258, 2 + ord("o")]
    stream = tokenize(json.dumps({"messages": TALK[:2]}), tokenizer=str(folder), chat=True)
    assert trained(stream) == "_" * 20 + "o.$"


def test_a_template_that_changes_the_past_is_refused(tokenize, folder: Path) -> None:
    (folder / "t.jinja").write_text("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match="in.jsonl:1: template changes the past"):
        tokenize(
            json.dumps({"messages": TALK}), tokenizer=str(folder), chat=True, chat_template=str(folder / "t.jinja")
        )


def test_a_template_may_refuse(tokenize, folder: Path) -> None:
    (folder / "t.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        tokenize(
            json.dumps({"messages": TALK}), tokenizer=str(folder), chat=True, chat_template=str(folder / "t.jinja")
        )


def test_a_template_cannot_reach_out(tokenize, folder: Path) -> None:
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "t.jinja").write_text(evil)
    with pytest.raises(DataError, match="template"):
        tokenize(
            json.dumps({"messages": TALK}), tokenizer=str(folder), chat=True, chat_template=str(folder / "t.jinja")
        )


@pytest.mark.parametrize("value", ["text", 5, [1], [{"content": "no role"}], None, {}])
def test_what_is_no_conversation(tokenize, folder: Path, value: object) -> None:
    source = json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": value})
    with pytest.raises(DataError, match="in.jsonl:2: no conversation"):
        tokenize(source, tokenizer=str(folder), chat=True)
    stream = tokenize(source, tokenizer=str(folder), chat=True, on_error="skip")
    assert stream.rejects == {"no conversation": 1}


def test_an_empty_conversation_is_counted(tokenize, folder: Path) -> None:
    source = json.dumps({"messages": []}) + "\n" + json.dumps({"messages": TALK})
    stream = tokenize(source, tokenizer=str(folder), chat=True)
    assert (len(stream.texts), stream.rejects) == (1, {"empty document": 1})


@pytest.mark.parametrize("value", ['"high"', "null", "NaN", "Infinity", "1e300", "1" * 400, "[1]"])
def test_rewards_are_numbers(tokenize, folder: Path, value: str) -> None:
    source = json.dumps({"messages": TALK})[:-1] + f', "r": {value}}}'
    with pytest.raises(DataError, match="no reward: 'r' is "):
        tokenize(source, tokenizer=str(folder), chat=True, reward_key="r")


def test_no_template(tokenize, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer().data)
    with pytest.raises(InputMissing, match="chat_template"):
        tokenize("{}", tokenizer=str(tmp_path), chat=True)
    with pytest.raises(UsageError, match="--chat"):
        tokenize("{}", only_last=True)


def test_what_no_tokenizer_can_encode(tokenize, folder: Path) -> None:
    """A lone surrogate, wherever the template takes it from."""
    for key in ("role", "content"):
        source = json.dumps({"messages": [{"role": "user", "content": "hi"} | {key: "a\ud800b"}]})
        with pytest.raises(DataError, match="lone surrogate"):
            tokenize(source, tokenizer=str(folder), chat=True)
        (text,) = tokenize(source, tokenizer=str(folder), chat=True, errors="replace").texts
        assert "a\ufffdb" in text


def test_numbers_of_a_conversation_stay_what_they_are(tokenize, folder: Path) -> None:
    (folder / "t.jinja").write_text("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    message = {"role": "user", "n": 1, "large": 12345678901234567890, "x": 0.5}
    options = {"tokenizer": str(folder), "chat": True, "chat_template": str(folder / "t.jinja")}
    (text,) = tokenize(json.dumps({"messages": [message]}), **options).texts
    assert json.loads(text.removesuffix("<|endoftext|>")) == message
    assert '"n": 1,' in text


def test_one_of_two_conversations_may_be_empty(tokenize, folder: Path) -> None:
    source = json.dumps({"a": TALK[:2], "b": []})
    for options in ({}, {"for_rm": True}, {"compat": "neox"}, {"compat": "neox", "for_rm": True}):
        stream = tokenize(source, tokenizer=str(folder), chat=True, key=["a", "b"], **options)
        assert stream.ids["b"] == [[0, 0] if "for_rm" in options else [0]]
        assert len(stream.ids["a"][0]) > 20


def test_rejects_come_in_the_order_of_the_input(tokenize, folder: Path) -> None:
    source = '{"messages": 5}\n{broken\n'
    with pytest.raises(DataError, match="in.jsonl:1: no conversation"):
        tokenize(source, tokenizer=str(folder), chat=True)


def test_binary_rewards(tokenize, folder: Path) -> None:
    source = "\n".join(json.dumps({"messages": TALK, "r": value}) for value in (True, False, 1, 0.0))
    options = {"tokenizer": str(folder), "chat": True, "reward_key": "r", "binary_reward": True}
    assert tokenize(source, **options).rewards == [1, -1, 1, -1]
    for value in ("false", None, []):
        with pytest.raises(DataError, match="no reward"):
            tokenize(json.dumps({"messages": TALK, "r": value}), **options)
