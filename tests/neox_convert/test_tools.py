# SPDX-License-Identifier: Apache-2.0
"""inspect, diff, cast, reshard, average, upload, and the files of an export."""

from __future__ import annotations

import io
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from libneox import load_model, run_directory
from libneox.checkpoint.hf import open_hf
from libneox.checkpoint.store import open_tensors, read_trainer, write_checkpoint
from libneox.errors import DataError, IntegrityError, StorageError, UsageError
from libneox.model_config import RopeScaling
from libneox.tokenizer import load_tokenizer
from neox_convert import convert, look, rewrite, upload
from neox_convert.convert import Options
from neox_convert.source import Where, find_source
from neox_convert.verify import available_bytes

QUIET = Options(verify=False, quiet=True)


def inspected(path: Path, **options: Any) -> dict[str, Any]:
    out = io.BytesIO()
    look.inspect(str(path), hashes=options.get("hashes", False), as_json=True, stdout=out)
    return json.loads(out.getvalue())


def test_inspect_says_the_same_of_every_format(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "run", small_config())
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    convert.to_neox(str(run), str(tmp_path / "neox"), tensor_parallel=2, layout="pipeline", options=QUIET)
    found = {name: inspected(tmp_path / name, hashes=True) for name in ("run", "hf", "neox")}
    assert [found[name]["kind"] for name in found] == ["native", "hf", "neox"]
    assert found["run"]["entries"] == found["hf"]["entries"] == found["neox"]["entries"]
    assert all(len(row["sha256"]) == 64 for row in found["run"]["entries"])
    assert found["run"]["parameters"] == sum(t.numel() for t in load_model(run).parameters())
    assert found["run"]["config"] == found["hf"]["config"]


def test_inspect_as_text_and_of_one_file(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "run", small_config())
    out = io.BytesIO()
    look.inspect(str(run), hashes=False, as_json=False, stdout=out)
    lines = out.getvalue().decode().splitlines()
    assert lines[0].startswith(f"{run}: a checkpoint of neox-train, ")
    assert any(line.split()[:3] == ["layers.0.attn.qkv.weight", "float32", "96x32"] for line in lines)
    single = inspected(run / "step_3" / "model-00001-of-00001.safetensors")
    assert single["tensors"] == len(lines) - 1
    torch.save({"a": {"b": [torch.ones(2)]}}, tmp_path / "x.pt")
    assert [row["name"] for row in inspected(tmp_path / "x.pt")["entries"]] == ["a/b/0"]


def test_diff(tmp_path: Path, make_run: Any, make_hf: Any, small_config: Any, run_command: Any) -> None:
    config = small_config()
    run, hf = make_run(tmp_path / "run", config), make_hf(tmp_path / "hf", config)
    out = io.BytesIO()
    look.diff(str(run), str(hf), as_json=False, stdout=out)
    assert out.getvalue() == b"28 tensors equal, 0 differ\n"
    tensors = load_file(hf / "model.safetensors")
    tensors["embed_out.weight"][3, 4] += 0.5
    save_file(tensors, hf / "model.safetensors")
    done = run_command(["neox-convert", "diff", run, hf, "--json"])
    assert done.returncode == 81
    found = json.loads(done.stdout)
    assert found["equal"] == 27
    assert [(change["name"], round(change["max_abs_diff"], 6)) for change in found["changes"]] == [("head.weight", 0.5)]
    with pytest.raises(IntegrityError):
        look.diff(str(run), str(make_run(tmp_path / "other", small_config(num_layers=1))), as_json=False, stdout=out)
    assert b"layers.1.attn_norm.weight: only in the first" in out.getvalue()
    tensors["embed_out.weight"][0, 0] = torch.nan
    save_file(tensors, hf / "model.safetensors")
    broken = run_command(["neox-convert", "diff", run, hf, "--json"])
    assert broken.returncode == 81
    assert json.loads(broken.stdout, parse_constant=pytest.fail)["changes"][0]["max_abs_diff"] is None


def test_cast_a_run_keeps_its_training_state(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "plain", small_config())
    model = {name: open_tensors(run / "step_3")[name] for name in open_tensors(run / "step_3")}
    yaml = (run / "step_3/config.yml").read_text()
    states = {f"master/{name}": tensor for name, tensor in model.items()}
    trainer = {"step": 3, "samples": 12, "tokens": 768, "epochs": {}, "optimizer": {"type": "adam", "step": 3}}
    write_checkpoint(
        tmp_path / "run/step_3", model, config_yaml=yaml, trainer=trainer, optimizer_tensors=states, step=3, samples=12
    )
    options = Options(dtype="bf16", quiet=True)
    rewrite.rewrite(str(tmp_path / "run"), str(tmp_path / "cast"), options=options)
    after = open_tensors(tmp_path / "cast/step_3")
    assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in model.items())
    optimizer = open_tensors(tmp_path / "cast/step_3", "optimizer")
    assert all(torch.equal(optimizer[name], tensor) for name, tensor in states.items())
    assert read_trainer(tmp_path / "cast/step_3") == trainer
    assert (tmp_path / "cast/step_3/config.yml").read_text() == yaml
    with pytest.raises(UsageError, match="step 3; it cannot become step 4"):
        rewrite.rewrite(str(tmp_path / "run"), str(tmp_path / "step_4"), options=options)


def test_cast_and_reshard_a_hugging_face_directory(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    hf = make_hf(tmp_path / "hf", small_config())
    (hf / "modeling_x.py").write_text("raise SystemExit")
    before = load_file(hf / "model.safetensors")
    rewrite.rewrite(str(hf), str(tmp_path / "half"), options=Options(dtype="float16", shard_size="100KB", quiet=True))
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    after = {name: t for file in files for name, t in load_file(tmp_path / "half" / file).items()}
    assert set(after) == set(index["weight_map"]) == set(before)
    assert all(torch.equal(after[name], tensor.half()) for name, tensor in before.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "float16"
    assert (tmp_path / "half/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert not (tmp_path / "half/modeling_x.py").exists()


def test_average(tmp_path: Path, make_run: Any, small_config: Any, run_command: Any) -> None:
    first = make_run(tmp_path / "a", small_config(), step=2)
    second = make_run(tmp_path / "b", small_config(), step=4)
    tensors = open_tensors(second / "step_4")
    doubled = {name: 3 * tensors[name] for name in tensors}
    yaml = (second / "step_4/config.yml").read_text()
    write_checkpoint(tmp_path / "c/step_4", doubled, config_yaml=yaml, step=4)
    done = run_command(["neox-convert", "average", first, tmp_path / "c", tmp_path / "mean", "-q"])
    assert done.returncode == 0, done.stderr
    mean = open_tensors(tmp_path / "mean/step_4")
    for name in tensors:
        torch.testing.assert_close(mean[name], 2 * tensors[name])
    rewrite.average([str(first), str(tmp_path / "c")], str(tmp_path / "w"), weights=(3, 1), step=9, options=QUIET)
    weighted = open_tensors(tmp_path / "w/step_9")
    for name in tensors:
        torch.testing.assert_close(weighted[name], 1.5 * tensors[name])
    other = make_run(tmp_path / "other", small_config(num_layers=1))
    with pytest.raises(DataError):
        rewrite.average([str(first), str(other)], str(tmp_path / "x"), weights=(), step=None, options=QUIET)
    with pytest.raises(UsageError):
        rewrite.average([str(first)], str(tmp_path / "x"), weights=(), step=None, options=QUIET)


ALIBI: dict[str, Any] = {"pos_emb": "alibi"}
YARN = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"rotary_base": 500000.0}, "rotary_base is 500000.0, not 10000"),
        ({}, {"rope_scaling": YARN}, "rope_scaling is {'type': 'yarn', 'factor': 4.0, "),
        ({}, {"pos_emb": "none"}, "pos_emb is none, not rotary"),
        ({}, {"norm_eps": 1e-6, "activation": "gelu_tanh"}, "norm_eps is 1e-06, not 1e-05, activation is gelu_tanh"),
        ({"norm_bias": False}, {"norm": "rmsnorm"}, "norm is rmsnorm, not layernorm"),
        ({}, {"sliding_window": 8}, "sliding_window is 8, not None"),
        ({"num_kv_heads": 2}, {"num_kv_heads": 2, "residual": "sequential"}, "residual is sequential, not parallel"),
    ],
)
def test_what_computes_something_else_is_not_averaged(
    tmp_path: Path, make_run: Any, small_config: Any, first: dict, second: dict, said: str
) -> None:
    a, b = (make_run(tmp_path / name, small_config(**keys)) for name, keys in (("a", first), ("b", second)))
    with pytest.raises(DataError) as refused:
        rewrite.average([str(a), str(b)], str(tmp_path / "x"), weights=(), step=None, options=QUIET)
    assert str(refused.value).startswith(f"{b}: is another model than {a}: {said}")
    assert str(refused.value).endswith("; only one model's can be averaged")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"seq_length": 32, "hidden_dropout": 0.1, "attention_dropout": 0.1, "init_method_std": 0.1}),
        ({}, {"vocab_size": 300, "max_position_embeddings": 128}),
        (ALIBI, ALIBI | {"rotary_base": 500000.0, "rpe_max_distance": 64}),
        ({"activation": "silu"}, {"activation": "swish"}),
    ],
)
def test_what_weights_mean_alike_is_averaged(
    tmp_path: Path, make_run: Any, small_config: Any, first: dict, second: dict
) -> None:
    a, b = (make_run(tmp_path / name, small_config(**keys)) for name, keys in (("a", first), ("b", second)))
    rewrite.average([str(a), str(b)], str(tmp_path / "x"), weights=(), step=None, options=QUIET)
    mean, tensors = open_tensors(tmp_path / "x/step_3"), open_tensors(a / "step_3")
    assert all(torch.equal(mean[name], tensors[name]) for name in tensors)


def test_a_run_and_its_export_are_averaged(tmp_path: Path, make_run: Any, make_hf: Any, small_config: Any) -> None:
    llama = {"norm": "rmsnorm", "activation": "swiglu", "residual": "sequential", "rotary_pct": 1.0, "mlp_bias": False}
    llama |= {"qkv_bias": False, "attn_out_bias": False, "ffn_size": 48, "rope_scaling": YARN}
    for name, fields in (("neox", {}), ("llama", llama)):
        config = small_config(**fields)
        run, hf = make_run(tmp_path / name / "run", config), make_hf(tmp_path / name / "hf", config)
        rewrite.average([str(run), str(hf)], str(tmp_path / name / "x"), weights=(), step=None, options=QUIET)
        assert len(open_tensors(tmp_path / name / "x/step_3")) == len(config.parameter_shapes())


def test_export_files(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """File modes, shards with an index, token ids in every file, both generations of rotary keys, trimmed padding."""
    run = make_run(tmp_path / "run", small_config(activation="gelu_tanh"))
    options = Options(verify=False, quiet=True, shard_size="60KB")
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=True, options=options)
    hf = tmp_path / "hf"
    (tmp_path / "mode").touch()
    usual = stat.S_IMODE((tmp_path / "mode").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in hf.iterdir()} == {usual}
    index = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    assert "embed_out.weight" in index
    assert all((hf / name).is_file() for name in index.values())
    config = json.loads((hf / "config.json").read_text())
    assert config["vocab_size"] == 258
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert (config["bos_token_id"], config["eos_token_id"], config["hidden_act"]) == (0, 0, "gelu_fast")
    generation = json.loads((hf / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 1)
    tokenizer = json.loads((hf / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["eos_token"] == "<|endoftext|>"
    ids = torch.arange(40).reshape(1, 40)
    with torch.inference_mode():
        whole, trimmed = load_model(run)(ids), load_model(hf)(ids)
    assert trimmed.shape[-1] == 258
    torch.testing.assert_close(trimmed, whole[..., :258], rtol=0, atol=1e-5)


def test_auto_tokenizer_gives_identical_ids(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    from transformers import AutoTokenizer

    run = make_run(tmp_path / "run", small_config())
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer("bytes")
    for text in ("plain", " \u00e9\u0301 \U0001f600\n\t", "cafe\u0301", "x<|endoftext|>y"):
        assert theirs(text)["input_ids"] == ours.encode(text, allow_special=True)


def test_inexact_families_are_refused_with_the_reason(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "run", small_config())
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot represent this model: norm is layernorm"):
        convert.to_hf(str(run), str(tmp_path / "hf"), arch="llama", trim_vocab=False, options=QUIET)
    with pytest.raises(UsageError, match="unknown"):
        convert.to_hf(str(run), str(tmp_path / "hf"), arch="bert", trim_vocab=False, options=QUIET)


def test_another_tokenizer_is_exported_and_checked(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """--tokenizer replaces the one of the run, in the files and in the comparison of ids with AutoTokenizer."""
    run = make_run(tmp_path / "run", small_config())
    tokenizer = json.loads(load_tokenizer("bytes").data)
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "lower.json").write_text(json.dumps(tokenizer))
    options = Options(quiet=True, tokenizer=str(tmp_path / "lower.json"))
    report = convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=options)
    assert report.verified.startswith("verified: logits of ours and of transformers")
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (tmp_path / "lower.json").read_bytes()


def test_pickled_weights_of_a_hugging_face_directory(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    """pytorch_model.bin is read without executing it, to the same tensors."""
    hf = make_hf(tmp_path / "hf", small_config())
    before = {name: tensor.clone() for name, tensor in open_hf(hf).items()}
    torch.save(load_file(hf / "model.safetensors"), hf / "pytorch_model.bin")
    (hf / "model.safetensors").unlink()
    after = open_hf(hf)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_wrong_kind_of_source(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    hf = make_hf(tmp_path / "hf", small_config())
    with pytest.raises(UsageError, match="is a Hugging Face directory already"):
        convert.to_hf(str(hf), str(tmp_path / "x"), arch="auto", trim_vocab=False, options=QUIET)
    assert find_source(str(hf)) == Where(kind="hf", path=str(hf))


def test_only_numbers_with_a_point_are_cast_and_templates_come_along(
    tmp_path: Path, make_hf: Any, small_config: Any
) -> None:
    hf = make_hf(tmp_path / "hf", small_config())
    mask = {"gpt_neox.layers.0.attention.bias": torch.ones(4, 4, dtype=torch.bool).tril()}
    save_file(load_file(hf / "model.safetensors") | mask, hf / "model.safetensors")
    (hf / "chat_template.jinja").write_text("{{ messages }}")
    rewrite.rewrite(str(hf), str(tmp_path / "half"), options=Options(dtype="bf16", quiet=True))
    after = load_file(tmp_path / "half/model.safetensors")
    assert torch.equal(after.pop("gpt_neox.layers.0.attention.bias"), mask["gpt_neox.layers.0.attention.bias"])
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert (tmp_path / "half/chat_template.jinja").read_text() == "{{ messages }}"


def test_an_index_beside_a_single_file_is_another_export_s(tmp_path: Path, make_hf: Any, small_config: Any) -> None:
    """A model.safetensors counts alone, whatever the index of the pickled files that were there before lists."""
    hf = make_hf(tmp_path / "hf", small_config())
    index = {"weight_map": {"gpt_neox.layers.0.attention.masked_bias": "pytorch_model-00001-of-00001.bin"}}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len(open_hf(hf)) == len(small_config().parameter_shapes())


def test_the_tokenizer_goes_back_under_its_own_name(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    """GPT-NeoX is told the kind of tokenizer, and given a file only where it reads one."""
    run = make_run(tmp_path / "run", small_config(vocab_size=512, padded_vocab_size=512))
    for tokenizer, kind, files in ((None, "HFTokenizer", ["tokenizer.json"]), ("charlevel", "CharLevelTokenizer", [])):
        out = tmp_path / kind
        options = Options(quiet=True, tokenizer=tokenizer)
        convert.to_neox(str(run), str(out), tensor_parallel=1, layout="pipeline", options=options)
        assert [path.name for path in out.iterdir() if path.is_file() and path.name != "latest"] == files
        assert f'"tokenizer_type": "{kind}"' in _as_json(out / "global_step3/configs/config.yml")


def _as_json(path: Path) -> str:
    import yaml

    return json.dumps(yaml.safe_load(path.read_text()))


def test_a_tokenizer_without_a_file_is_kept_with_a_checkpoint(tmp_path: Path, make_run: Any, small_config: Any) -> None:
    run = make_run(tmp_path / "run", small_config(vocab_size=512, padded_vocab_size=512))
    options = Options(verify=False, quiet=True, tokenizer="charlevel")
    rewrite.rewrite(str(run), str(tmp_path / "again"), options=options)
    assert load_tokenizer(tmp_path / "again").kind == "charlevel"


def test_usage_is_checked_before_anything_is_read(tmp_path: Path, run_command: Any) -> None:
    for option, value in (("--dtype", "float12"), ("--max-shard-size", "lots")):
        done = run_command(["neox-convert", "to-hf", tmp_path / "gone", tmp_path / "hf", option, value])
        assert (done.returncode, done.stdout) == (2, b"")
        assert value.encode() in done.stderr
    for weights in ((float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(UsageError, match="--weight"):
            rewrite.average(["a", "b"], str(tmp_path / "x"), weights=weights, step=None, options=QUIET)


def test_names_that_are_no_utf8(tmp_path: Path, make_run: Any, small_config: Any, run_command: Any) -> None:
    run, out = make_run(tmp_path / "run", small_config()), os.fsencode(tmp_path) + b"/caf\xe9"
    done = run_command(["neox-convert", "to-hf", run, os.fsdecode(out), "--no-verify", "-q"])
    assert (done.returncode, done.stdout) == (0, out + b"\n"), done.stderr


def test_a_checkpoint_is_hashed_once(
    tmp_path: Path, make_run: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = make_run(tmp_path / "run", small_config()), []
    verify = run_directory.verify_step
    monkeypatch.setattr(run_directory, "verify_step", lambda path: seen.append(path) or verify(path))
    convert.to_hf(str(run), str(tmp_path / "hf"), arch="auto", trim_vocab=False, options=QUIET)
    assert seen == [run / "step_3"]


def test_raw_weights_of_llama_3(tmp_path: Path, run_command: Any) -> None:
    """Its rank file is called tokenizer.model, is no sentencepiece model, and does not stop the import."""
    raw, dim = tmp_path / "raw", 16
    raw.mkdir()
    square = {f"attention.{name}": (dim, dim) for name in ("wq", "wk", "wv", "wo")}
    wide = {f"feed_forward.{name}": (24, dim) for name in ("w1", "w3")} | {"feed_forward.w2": (dim, 24)}
    shapes = square | wide | {"attention_norm": (dim,), "ffn_norm": (dim,)}
    weights = {f"layers.0.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"{name}.weight": torch.randn(64, dim) for name in ("tok_embeddings", "output")}
    torch.save(weights | {"norm.weight": torch.ones(dim)}, raw / "consolidated.00.pth")
    (raw / "params.json").write_text(json.dumps({"dim": dim, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5}))
    (raw / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    done = run_command(["neox-convert", "from-meta", raw, tmp_path / "run"])
    assert done.returncode == 0, done.stderr
    assert b"without a tokenizer" in done.stderr
    with open_tensors(tmp_path / "run/step_0") as tensors:
        assert torch.equal(tensors["embed.weight"], weights["tok_embeddings.weight"])


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    """Pages of files that were only read or written count as free, as the machine's own figure has it."""
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\nHugePages_Total: 0\n")
    assert available_bytes(tmp_path) == 5_120_000
    for name, text in (("max", "4000000"), ("current", "3900000"), ("stat", "anon 100\ninactive_file 3000000")):
        (group / f"memory.{name}").write_text(f"{text}\n")
    assert available_bytes(tmp_path) == 3_100_000
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 5_120_000


class FakeHub:
    """Records what it is asked to do; or fails as the hub does, with the token in the message."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, fail: bool = False):
        self.calls, self.fail = [], fail

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_repo", {"repository": repository, **options}))
        if self.fail:
            raise RuntimeError("401 for token hf_secret: denied")

    def create_branch(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_branch", options))

    def upload_folder(self, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        return "https://hub.invalid/commit/1"


def test_upload(tmp_path: Path, make_hf: Any, small_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hf = make_hf(tmp_path / "hf", small_config())
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert upload.upload(str(hf), "me/x", branch="v1", private=True, message=None) == "https://hub.invalid/commit/1"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[2][1]["revision"] == "v1"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(fail=True))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    with pytest.raises(StorageError) as caught:
        upload.upload(str(hf), "me/x", branch=None, private=False, message=None)
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(UsageError):
        upload.upload(str(tmp_path), "me/x", branch=None, private=False, message=None)


def test_command_line(run_command: Any, tmp_path: Path) -> None:
    assert run_command(["neox-convert"]).returncode == 2
    done = run_command(["neox-convert", "frobnicate"])
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no verb" in done.stderr
    assert run_command(["neox-convert", "to-hf", tmp_path / "nothing", tmp_path / "out"]).returncode == 66
    assert run_command(["neox-convert", "cast", tmp_path, tmp_path / "out"]).returncode == 2
