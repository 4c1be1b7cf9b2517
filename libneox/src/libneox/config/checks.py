# SPDX-License-Identifier: Apache-2.0
"""Checks across keys: combinations that cannot mean anything. Each is reported with its place and a remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from libneox.config.architecture import check_architecture
from libneox.config.problems import Problems, suggestion
from libneox.config.tree import all_keys
from libneox.errors import UsageError

if TYPE_CHECKING:
    from libneox.config.tree import NeoxConfig

OPTIMIZERS: dict[str, tuple[str, ...]] = {  # type to the arguments it takes
    "adam": ("lr", "betas", "eps", "amsgrad", "bias_correction", "adam_w_mode", "torch_adam", "fused", "set_grad_none"),
    "adamw": (
        "lr",
        "betas",
        "eps",
        "amsgrad",
        "bias_correction",
        "adam_w_mode",
        "torch_adam",
        "fused",
        "set_grad_none",
    ),
    "cpu_adam": ("lr", "betas", "eps", "bias_correction", "adamw_mode", "fp32_optimizer_states", "amsgrad"),
    "cpu_torch_adam": ("lr", "betas", "eps", "amsgrad"),
    "sgd": ("lr", "momentum", "dampening", "nesterov"),
    "lion": ("lr", "betas"),
    "sm3": ("lr", "momentum", "beta", "eps"),
    "madgrad_wd": ("lr", "momentum", "eps"),
    "muon": ("lr", "momentum", "nesterov", "ns_steps", "betas", "eps", "adam_lr"),
    "adafactor": ("lr", "beta2_decay", "eps", "d"),
}
MUP_OPTIMIZERS = ("adam", "adamw", "cpu_adam", "cpu_torch_adam", "sgd", "lion", "sm3")  # muP says how rates scale
_ONEBIT = "is 1-bit Adam, which DeepSpeed dropped after version 0.19.6; use adam"
_GONE_FROM_ZERO = {
    "mics_shard_size": "MiCS",
    "mics_hierarchical_params_gather": "MiCS",
    "zeropp_loco_param": "LoCo-ZeRO++",
    "grad_partitioned": "such setting of ZeRO",
}
_PAIRS = ("train", "valid", "test")
_NUMBERS = ("lr", "momentum", "dampening", "beta", "beta2_decay", "eps", "d", "ns_steps", "adam_lr")


def check_values(config: NeoxConfig, problems: Problems) -> None:
    """Add to `problems` whatever is wrong with the values of a loaded configuration."""
    check = _Check(config, problems)
    check.refused_keys()
    check.optimizer()
    check.schedule()
    check.cadence()
    check.data_paths()
    check.zero()
    check.tokenizer()
    check.mup()
    check.curriculum()
    check.eight_bit()
    if any(config.is_set(name) for name in ("num_layers", "hidden_size", "num_attention_heads")):
        check_architecture(config, problems)


class _Check:
    def __init__(self, config: NeoxConfig, problems: Problems):
        self.config, self.problems = config, problems

    def bad(self, key: str, message: str) -> None:
        place = self.config.places.get(key) or self.config.places.get(key.partition(".")[0])
        self.problems.add(place, key, message)

    def refused_keys(self) -> None:
        for name, key in all_keys().items():
            if key.standing == "refused" and self.config.is_set(name):
                self.bad(name, f"is not supported: {key.reason}; remove it")

    def optimizer(self) -> None:
        section = self.config.optim.optimizer
        if section is None:
            return
        kind, params = section.get("type", "adam"), section.get("params") or {}
        if not isinstance(kind, str):
            self.bad("optimizer.type", f"expected the name of an optimizer, found {kind!r}")
            return
        if kind.lower() in ("onebitadam", "onebitlamb", "zerooneadam"):
            self.bad("optimizer.type", f"{kind} {_ONEBIT}")
            return
        if kind.lower() not in OPTIMIZERS:
            hint = suggestion(kind.lower(), OPTIMIZERS) or f"; known are {', '.join(OPTIMIZERS)}"
            self.bad("optimizer.type", f"{kind!r} is no optimizer{hint}")
            return
        if not isinstance(params, dict):
            self.bad("optimizer.params", "expected a mapping")
            return
        self._optimizer_params(kind.lower(), params)

    def _optimizer_params(self, kind: str, params: dict[str, Any]) -> None:
        remedies = {"weight_decay": "use the key weight_decay", "max_grad_norm": "use the key gradient_clipping"}
        known = OPTIMIZERS[kind]
        for name, value in params.items():
            key = f"optimizer.params.{name}"
            if name in remedies:
                self.bad(key, f"is no argument of the optimizer; {remedies[name]}")
            elif name not in known:
                self.bad(key, f"is no argument of {kind}{suggestion(name, known) or '; it takes ' + ', '.join(known)}")
            elif kind == "adafactor" and name == "eps":
                if not _is_pair(value, first_may_be_none=True):
                    self.bad(key, f"expected two numbers, the first or null, such as [null, 0.001], found {value!r}")
            elif name in _NUMBERS and not _is_number(value):
                self.bad(key, f"expected a number, found {value!r}")
            elif name == "betas" and not _is_pair(value):
                self.bad(key, f"expected two numbers such as [0.9, 0.95], found {value!r}")
            elif name in ("bias_correction", "fp32_optimizer_states") and value is not True:
                self.bad(key, "is always true here; remove it")
        if _is_number(params.get("lr")) and params["lr"] < 0:
            self.bad("optimizer.params.lr", f"is {params['lr']}; it must be at least 0")

    def schedule(self) -> None:
        lr = self.config.optimizer_params.get("lr", 1e-3)
        if _is_number(lr) and self.config.schedule.min_lr > lr:
            self.bad("min_lr", f"is {self.config.schedule.min_lr}, more than the learning rate {lr}; lower it")
        train = self.config.train
        if train.train_iters is not None and train.train_epochs is not None:
            self.bad("train_epochs", f"contradicts train_iters {train.train_iters}; keep one of them")
        if train.override_lr_scheduler and train.use_checkpoint_lr_scheduler:
            self.bad("use_checkpoint_lr_scheduler", "contradicts override_lr_scheduler; keep one of them")

    def cadence(self) -> None:
        factor, scale = self.config.train.checkpoint_factor, self.config.train.checkpoint_scale
        if factor is not None and scale == "linear" and factor != int(factor):
            self.bad("checkpoint_factor", f"is {factor}; a period must be whole, or set checkpoint_scale: log")
        if factor is not None and scale == "log" and factor <= 1:
            self.bad("checkpoint_factor", f"is {factor}; with checkpoint_scale log it must be more than 1")
        log = self.config.log
        if log.profile and log.profile_step_stop <= log.profile_step_start:
            self.bad("profile_step_stop", f"is not after profile_step_start {log.profile_step_start}")

    def data_paths(self) -> None:
        data = self.config.data
        given = [name for name in _PAIRS if self.config.get(f"{name}_data_paths")]
        if given and data.data_path is not None:
            self.bad("data_path", f"contradicts {given[0]}_data_paths; keep one of them")
        if given and "train" not in given:
            self.bad(f"{given[0]}_data_paths", "needs train_data_paths too")
        for name in _PAIRS:
            paths = self.config.get(f"{name}_data_paths") or []
            for kind in ("data_weights", "label_data_paths", "reward_data_paths"):
                self._same_length(f"{name}_{kind}", f"{name}_data_paths", paths)
            good = self.config.get(f"pos_{name}_data_paths") or []
            self._same_length(f"neg_{name}_data_paths", f"pos_{name}_data_paths", good)
            for side in ("pos", "neg"):
                self._same_length(f"{side}_{name}_label_data_paths", f"{side}_{name}_data_paths", good)
        shares = [part.strip() for part in data.split.replace("/", ",").split(",") if part.strip()]
        if not shares or len(shares) > 3 or not all(_is_share(part) for part in shares):
            self.bad("split", f"{data.split!r} is no list of up to three shares such as '969, 30, 1'")
        elif sum(map(float, shares)) <= 0:
            self.bad("split", f"{data.split!r} leaves no documents for anything")
        if data.data_impl == "cached":
            self.bad("data_impl", "cached (TNTIDX) files are not read; tokenize the text again with neox-tokenize")
        if data.dataset_impl == "pairwise" and data.pack_impl == "packed":
            self.bad("pack_impl", "packed cuts preference pairs apart; use unpacked or pack_until_overflow")

    def _same_length(self, key: str, other: str, paths: list[str]) -> None:
        values = self.config.get(key)
        if values is not None and len(values) != len(paths):
            self.bad(key, f"has {len(values)} entries but {other} has {len(paths)}; they belong together one by one")

    def tokenizer(self) -> None:
        keys = self.config.tokenizer
        if keys.tokenizer is not None and keys.vocab_file is not None and keys.tokenizer != keys.vocab_file:
            self.bad("vocab_file", f"contradicts tokenizer {keys.tokenizer}; keep one of them")
        if keys.merge_file is None or keys.vocab_file is None or not keys.tokenizer_type.endswith("GPT2BPETokenizer"):
            return
        folder, _, name = keys.vocab_file.rpartition("/")
        beside = [name.replace("vocab.json", "merges.txt"), "merges.txt"]
        if keys.merge_file not in [f"{folder}/{merges}" if folder else merges for merges in beside]:
            self.bad("merge_file", f"must lie beside {keys.vocab_file} as {beside[0]}; move or link it there")

    def mup(self) -> None:
        if self.config.mup.use_mup and self.config.mup.mup_base_hidden_size is None:
            self.bad("use_mup", "needs mup_base_hidden_size, the width whose hyper-parameters these are")
        kind = self.config.optimizer_type
        if self.config.mup.use_mup and kind in OPTIMIZERS and kind not in MUP_OPTIMIZERS:
            self.bad("use_mup", f"has no rule for the rates of {kind}; set optimizer.type to adam, sgd, lion or sm3")

    def curriculum(self) -> None:
        from libneox.curriculum import curriculum_of

        try:
            curriculum_of(self.config)
        except UsageError as error:
            key, _, message = str(error).partition(": ")
            self.bad(key, message)

    def eight_bit(self) -> None:
        config = self.config
        if not config.optim.use_bnb_optimizer:
            return
        for wrong, why in (
            (config.optimizer_type not in ("adam", "adamw"), f"{config.optimizer_type} has no such form; take adam"),
            (not config.optimizer_params.get("adam_w_mode", True), "decay is decoupled; remove adam_w_mode"),
            (config.optimizer_params.get("amsgrad"), "there is no amsgrad; remove it"),
            (config.zero_stage > 1, "its moments have blocks that ZeRO cuts; set zero_optimization.stage: 0"),
            (config.get("engine") == "deepspeed", "its moments have blocks that ZeRO cuts; set engine: auto"),
            (config.tensor_parallel > 1, "its moments have blocks of whole tensors; set model_parallel_size: 1"),
        ):
            if wrong:
                self.bad("use_bnb_optimizer", why)

    def zero(self) -> None:
        section = self.config.parallel.zero_optimization
        if section is not None:
            stage = section.get("stage", 0)
            if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
                self.bad("zero_optimization.stage", f"expected 0, 1, 2 or 3, found {stage!r}")
            for name, what in _GONE_FROM_ZERO.items():
                if name in section:
                    self.bad(f"zero_optimization.{name}", f"is not supported: DeepSpeed 0.19 has no {what}; remove it")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: Any, *, first_may_be_none: bool = False) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return _is_number(value[1]) and (_is_number(value[0]) or (first_may_be_none and value[0] is None))


def _is_share(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False
