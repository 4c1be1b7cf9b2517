# SPDX-License-Identifier: Apache-2.0
"""The child process of `neox_convert.verify`: reads a Job as JSON on stdin, prints one JSON object on stdout."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from neox_convert.source import Source, Where, open_source
from neox_convert.verify import RELATIVE_TOLERANCE, TOLERANCE, Job

TEXT = "The quick brown fox jumps over the lazy dog.\n\tfor i in range(10):\n        print(f'{i} squared', i**2)\n"
RANDOM_TOKENS = 32


def main() -> None:
    """Compare, and answer on the real stdout whatever libraries print."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    fields = json.load(sys.stdin)
    ours = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.pop("ours").items()}
    print(json.dumps(compare(Job(ours=Where(**ours), **fields))), file=answer, flush=True)


def compare(job: Job) -> dict[str, Any]:
    """`equal`, and in words `what` was compared and what came out."""
    source = open_source(job.ours, job.tokenizer)
    if difference := _tokenizer_difference(job, source):
        return {"equal": False, "what": difference}
    batches = _token_batches(job, source)
    ours, theirs = _our_logits(source, job, batches), _transformers_logits(job.theirs, batches)
    worst, limit, same_choice, count = 0.0, TOLERANCE, True, 0
    for mine, other in zip(ours, theirs, strict=True):
        rows = min(job.rows, mine.shape[-1], other.shape[-1])
        mine, other = mine[..., :rows], other[..., :rows]
        if not (mine.isfinite().all() and other.isfinite().all()):
            return {"equal": False, "what": "logits are not finite"}
        worst = max(worst, float((mine - other).abs().max()))
        limit = max(limit, RELATIVE_TOLERANCE * float(mine.abs().max()))
        best = mine.topk(min(2, rows), -1).values
        clear = (best[..., 0] - best[..., -1]) > 2 * limit  # a tie may fall either way
        same_choice &= bool((mine.argmax(-1) == other.argmax(-1))[clear].all())
        count += mine.shape[0] * mine.shape[1]
    what = f"logits of ours and of transformers differ by at most {worst:.2g} on {count} tokens (limit {limit:.2g})"
    return {"equal": worst <= limit and same_choice, "what": what}


def _token_batches(job: Job, source: Source) -> list[Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = min(source.config.vocab_size, job.rows)
    batches = [torch.randint(vocabulary, (2, min(RANDOM_TOKENS, job.length)), generator=generator)]
    if source.tokenizer is not None:
        ids = [i for i in source.tokenizer.encode(TEXT) if i < vocabulary][: job.length]
        if ids:
            batches.append(torch.tensor([ids]))
    return batches


def _our_logits(source: Source, job: Job, batches: list[Any]) -> list[Any]:
    import torch

    from libneox.checkpoint.lazy import LazyTensors
    from libneox.checkpoint.load import build_model
    from neox_convert.writing import cast_all, parse_dtype

    tensors = LazyTensors(cast_all(source.tensors, parse_dtype(job.dtype)))
    model = build_model(source.config, tensors, source=job.ours.path, dtype=torch.float32)
    with torch.inference_mode():
        return [model(ids).float() for ids in batches]


def _transformers_logits(directory: str, batches: list[Any]) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as plain:
        _link_plain(Path(directory), Path(plain))
        model, info = AutoModelForCausalLM.from_pretrained(
            plain,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        if missing := info["missing_keys"]:
            raise SystemExit(f"transformers misses {min(missing)} in {directory}")
        model.eval()
        with torch.inference_mode():
            return [model(input_ids=ids, use_cache=False).logits.float() for ids in batches]


def _link_plain(directory: Path, plain: Path) -> None:
    """The weights and a config.json without whatever could name code: it may be somebody else's."""
    config = json.loads((directory / "config.json").read_bytes())
    dropped = ("auto_map", "quantization_config", "attn_implementation", "trust_remote_code", "custom_pipelines")
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in dropped}
    (plain / "config.json").write_text(json.dumps(kept))
    for path in directory.iterdir():
        if path.name.endswith((".safetensors", ".bin", ".index.json")):
            (plain / path.name).symlink_to(path.resolve())


def _tokenizer_difference(job: Job, source: Source) -> str:
    """What AutoTokenizer makes differently from the source's tokenizer; empty if nothing."""
    if source.tokenizer is None or not job.check_tokenizer:
        return ""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(job.theirs, local_files_only=True)
    for text in (TEXT, "  caf\u00e9 \u2014 na\u00efve \U0001f600\n\n", "a" * 40, "<|endoftext|>x"):
        if list(theirs(text)["input_ids"]) != source.tokenizer.encode(text, allow_special=True):
            return f"AutoTokenizer gives other ids than the source's tokenizer for {text!r}"
    return ""


if __name__ == "__main__":
    main()
