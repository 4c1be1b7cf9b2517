# SPDX-License-Identifier: Apache-2.0
"""`coord_check: true`: with muP activations keep their size when the model gets wider, without it they grow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

STEADY = ("layers.0.attn", "layers.0.mlp", "layers.0", "layers.1.attn", "layers.1.mlp", "layers.1", "final_norm")
CHECK = {
    "coord_check": True, "train_batch_size": None, "train_iters": None, "hidden_size": 32, "padded_vocab_size": 512,
    "optimizer": {"type": "adam", "params": {"lr": 0.002, "betas": [0.9, 0.95], "eps": 1e-8}},
}  # fmt: skip


def last_slopes(run: Path) -> dict[str, float]:
    """Module -> slope after the last step."""
    lines = [json.loads(line) for line in (run / "coord_check.jsonl").read_text().splitlines()]
    return {line["module"]: line["slope"] for line in lines if "slope" in line and line["step"] == 3}


def grown(run: Path, module: str) -> float:
    """How many times larger a module's output is at the widest than at the narrowest, after the last step."""
    lines = [json.loads(line) for line in (run / "coord_check.jsonl").read_text().splitlines()]
    sizes = {x["width"]: x["mean_abs"] for x in lines if "width" in x and x["module"] == module and x["step"] == 3}
    assert sorted(sizes) == [32, 64, 128, 256]
    return sizes[256] / sizes[32]


def test_with_mup_nothing_grows_and_without_it_much_does(train, config, tmp_path: Path) -> None:
    done = train(config(**CHECK, use_mup=True, mup_base_hidden_size=32))
    run = tmp_path / "RUN"
    assert [tmp_path / line for line in done.lines] == [run / "coord_check.jsonl", run / "coord_check.png"]
    assert (run / "coord_check.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in run.iterdir()) == ["coord_check.jsonl", "coord_check.png"]
    slopes = last_slopes(run)
    assert {*STEADY, "embed", "layers.0.attn.scores", "layers.1.attn.scores", "logits"} == set(slopes)
    assert all(abs(slopes[module]) < 0.3 for module in STEADY), slopes
    assert max(slopes.values()) < 0.3, slopes
    assert 0.5 < grown(run, "layers.1") < 2
    assert "nothing grows with width" in done.stderr

    done = train(config(**CHECK), "--set", "optimizer.params.lr=0.02")
    slopes = last_slopes(run)
    assert slopes["layers.1"] > 0.7
    assert slopes["logits"] > 0.5
    assert grown(run, "layers.1") > 4
    assert "layers.1.mlp: slope +" in done.stderr
    assert "set use_mup: true" in done.stderr


@pytest.mark.parametrize(("kind", "lr"), [("sgd", 0.1), ("lion", 0.002), ("sm3", 0.002)])
def test_other_optimizers_have_their_rule(config, kind: str, lr: float) -> None:
    """Outputs stay level and logits move at every width; SGD's rule is another than Adam's."""
    import torch

    from libneox.config import load_config
    from neox_train.coord_check import measure, model_and_batches, model_at, slopes

    optimizer = {"type": kind, "params": {"lr": lr}}
    mup = {"use_mup": True, "mup_base_hidden_size": 32, "init_method_std": 0.1, "gradient_clipping": 0}
    loaded = load_config([config(**(CHECK | mup | {"optimizer": optimizer}))])
    cpu = torch.device("cpu")
    model, batches = model_and_batches(loaded, cpu)
    records = [r for width in (32, 64, 128) for r in measure(loaded, model_at(model, width), batches[:1] * 4, cpu)]
    found = {s.module: s.slope for s in slopes(records) if s.step == 3}
    assert all(abs(found[module]) < 0.3 for module in (*STEADY, "embed")), found
    assert max(found.values()) < 0.3, found
    sizes = {(r.width, r.step): r.mean_abs for r in records if r.module == "logits"}
    assert all(abs(sizes[width, 3] - sizes[width, 0]) > 0.001 for width in (32, 64, 128)), sizes


def test_a_narrow_base_and_gated_grouped_queries(train, config, tmp_path: Path) -> None:
    """The widths are multiples of the base, not of the configured model; heads keep their size and their sharing."""
    import torch

    from libneox.config import load_config
    from neox_train.coord_check import model_and_batches, model_at, widths_of

    path = config(
        **(CHECK | {"hidden_size": 64, "num_attention_heads": 8}), num_kv_heads=4, use_mup=True,
        mup_base_hidden_size=32, activation="swiglu", ffn_hidden_size=160, norm="rmsnorm", hidden_dropout=0.1,
    )  # fmt: skip
    loaded = load_config([path])
    model, batches = model_and_batches(loaded, torch.device("cpu"))
    assert widths_of(loaded, model) == [32, 64, 128, 256]
    assert model_at(model, 64) == model
    assert model.hidden_dropout == 0
    narrow = model_at(model, 32)
    assert (narrow.num_heads, narrow.num_kv_heads, narrow.head_dim, narrow.ffn_size) == (4, 2, 8, 80)
    assert len({batch.ids.numpy().tobytes() for batch in batches}) == 4
    done = train(path, "-q")
    assert len(done.lines) == 2
    assert done.stderr == ""


def test_the_scores_are_those_of_attention(config) -> None:
    """With values that tell which key was looked at, the recorded scores give back what attention returns."""
    import torch

    from libneox.config import load_config
    from libneox.model import Transformer, init_weights
    from neox_train.coord_check import _scores

    model_config = load_config([config(**CHECK)]).model_config(257)
    model = init_weights(Transformer(model_config), 1)
    attention, context = model.layers[0].attn, model.context(8)
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = torch.ones(8, 8, dtype=torch.bool).tril()
        scores = torch.full((1, 4, 8, 8), float("-inf"))
        scores[..., seen] = _scores(attention, x, context)
        values = attention.projected(x, context)[2].transpose(1, 2)
        mixed = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(attention.out(mixed), attention(x, context))


def test_without_data_the_ids_are_random_and_it_says_so(train, config, tmp_path: Path) -> None:
    done = train(config(**CHECK, data_path=None), "--set", "num_layers=1")
    assert "random ids" in done.stderr
    assert last_slopes(tmp_path / "RUN").keys() >= {"layers.0.mlp", "logits"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mup": True}, "needs mup_base_hidden_size"),
        ({"use_mup": True, "mup_base_hidden_size": 32, "optimizer": {"type": "muon"}}, "no rule for the rates of muon"),
        ({"use_mup": True, "mup_base_hidden_size": 12}, "no multiple of the head's 8"),
        ({"save_base_shapes": True}, "set mup_base_hidden_size"),
        ({"base_shapes_file": "x"}, "set mup_base_hidden_size"),
    ],
)
def test_what_cannot_be_checked(train, config, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    from libneox.errors import UsageError

    try:
        error = train(config(**(CHECK | changes)), code=2).stderr
    except UsageError as raised:  # said when the file is read
        error = str(raised)
    assert message in error
    assert not (tmp_path / "RUN").exists()


def test_several_processes_are_refused(train, config, monkeypatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert "one process" in train(config(**CHECK), code=2).stderr


def test_without_matplotlib_nothing_is_trained(train, config, monkeypatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = train(config(**CHECK), code=66)
    assert "pip install 'neox-train[plots]'" in done.stderr
    assert not (tmp_path / "RUN").exists()


def test_a_width_that_diverges_is_named(train, config) -> None:
    done = train(config(**CHECK, gradient_clipping=0), "--set", "optimizer.params.lr=1e30", code=80)
    assert "width 32 after" in done.stderr
    assert "lower the learning rate" in done.stderr
