# SPDX-License-Identifier: Apache-2.0
"""Tiny random models in Hugging Face directories, and small local tasks of every kind."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

CONTEXT = 64  # what the tiny models read at most: with a byte tokenizer, shorter than many of the questions


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models, peaked enough that greedy decoding and choices are no ties."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {
        "vocab_size": 258,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(5)
    models = {
        "pythia": GPTNeoXForCausalLM(GPTNeoXConfig(**common, intermediate_size=128)),
        "llama": LlamaForCausalLM(LlamaConfig(**common, intermediate_size=96, num_key_value_heads=2)),
    }
    folder = tmp_path_factory.mktemp("hf")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        add_tokenizer(folder / name, bos=name == "llama")
    return {name: folder / name for name in models}


def add_tokenizer(folder: Path, *, bos: bool) -> None:
    """The built-in byte tokenizer; for Llama one that puts a BOS in front, as Llama's does."""
    from libneox.tokenizer import byte_tokenizer

    (folder / "tokenizer.json").write_bytes(byte_tokenizer().data)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "model_max_length": CONTEXT,
    }
    if bos:
        settings["bos_token"] = "<|endoftext|>"
        document = json.loads(byte_tokenizer().data)
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One task file of each kind; contexts from none to three times what the models read."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(7)

    def words(count: int) -> str:
        return " ".join("".join(rng.choices("abcdefghij é", k=rng.randint(1, 7))) for _ in range(count))

    lengths = [0, 1, 3, 5, 8, 12, 20, 40]
    write(folder / "choice.jsonl", [
        {"question": words(n), "choices": [words(1), words(2) + " ", "x", " ", "\n" + words(2)], "answer": n % 5}
        for n in lengths * 2
    ])  # fmt: skip
    write(folder / "greedy.jsonl", [{"prompt": words(n) + " " * (n % 3), "continuation": words(2)} for n in lengths])
    write(folder / "texts.jsonl", [{"text": words(n)} for n in [*lengths, 30, 60]] + [{"text": "t " * 16}])
    write(folder / "shots.jsonl", [{"question": words(n), "answer": n % 2} for n in range(6)])
    write(folder / "write.jsonl", [{"prompt": words(n), "target": "abc"} for n in (1, 2, 5, 9, 30)])
    settings = {
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
                   "doc_to_target": "answer", "target_delimiter": "",
                   "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "greedy": {"output_type": "loglikelihood", "doc_to_text": "{{prompt}}", "doc_to_target": "{{continuation}}",
                   "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        "shots": {"output_type": "multiple_choice", "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": ["A", "B"],
                  "doc_to_target": "answer", "num_fewshot": 2, "fewshot_split": "test",
                  "metric_list": [{"metric": "acc"}]},
        "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                  "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}]},
        "write": {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{target}}",
                  "generation_kwargs": {"until": ["a", "é"], "max_gen_toks": 24, "do_sample": False},
                  "metric_list": [{"metric": "exact_match"}]},
    }  # fmt: skip
    files = {}
    for name, body in settings.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
            "test_split": "test",
            "metadata": {"version": 1.0},
            **body,
        }
        files[name] = folder / f"{name}.yaml"
        files[name].write_text(json.dumps(task))  # YAML reads JSON
    return files


def write(path: Path, documents: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
