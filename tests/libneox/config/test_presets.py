# SPDX-License-Identifier: Apache-2.0
"""Presets have the sizes of the published models."""

from __future__ import annotations

import pytest

from libneox.config import list_presets, load_config
from libneox.config.support import check_supported
from libneox.schedule import schedule_of

SIZES = {
    "pythia/14M": (14_067_712, 1_189_888),
    "pythia/31M": (30_494_720, 4_739_072),
    "pythia/70M": (70_426_624, 18_915_328),
    "pythia/160M": (162_322_944, 85_056_000),
    "pythia/410M": (405_334_016, 302_311_424),
    "pythia/1B": (1_011_781_632, 805_736_448),
    "pythia/1.4B": (1_414_647_808, 1_208_602_624),
    "pythia/2.8B": (2_775_208_960, 2_517_652_480),
    "pythia/6.9B": (6_857_302_016, 6_444_163_072),
    "pythia/12B": (11_846_072_320, 11_327_027_200),
    "20B": (20_554_567_680, 19_934_859_264),
    "gpt3/19M": (70_426_624, 18_915_328),
    "gpt3/49M": (113_625_600, 49_236_480),
    "gpt3/125M": (162_322_944, 85_056_000),
    "gpt3/350M": (405_334_016, 302_311_424),
    "gpt3/760M": (834_493_440, 679_959_552),
    "gpt3/800M": (1_011_781_632, 805_736_448),
    "gpt3/1.3B": (1_414_647_808, 1_208_602_624),
    "gpt3/2.7B": (2_775_208_960, 2_517_652_480),
    "gpt3/6.7B": (6_856_253_440, 6_444_163_072),
    "gpt3/13B": (13_100_697_600, 12_585_584_640),
    "gpt3/175B": (175_197_806_592, 173_961_535_488),
    "llama/7B": (6_738_415_616, 6_476_271_616),
    "llama/13B": (13_015_864_320, 12_688_184_320),
    "llama/30B": (32_528_943_616, 32_102_959_616),
    "llama/65B": (65_285_660_672, 64_761_372_672),
    "llama2/7B": (6_738_415_616, 6_476_271_616),
    "llama2/13B": (13_015_864_320, 12_688_184_320),
    "llama2/70B": (68_976_648_192, 68_976_648_192 - 2 * 32000 * 8192),
    "llama3/8B": (8_030_261_248, 6_979_588_096),
    "codellama/7B": (6_738_546_688, 6_738_546_688 - 2 * 32016 * 4096),
    "codellama/34B": (33_743_970_304, 33_743_970_304 - 2 * 32000 * 8192),
    "llemma/7B": (6_738_546_688, 6_738_546_688 - 2 * 32016 * 4096),
    "llemma/34B": (33_743_970_304, 33_743_970_304 - 2 * 32000 * 8192),
    "mistral/7B": (7_241_732_096, 6_979_588_096),
    "falcon/7B": (6_921_720_704, 6_921_720_704 - 65024 * 4544),
    "palm/8B": (8_632_012_800, 8_632_012_800 - 256000 * 4096),
}


def test_the_list_is_complete_and_sorted_by_size() -> None:
    listed = list_presets()
    assert {preset.name: preset.parameters for preset in listed} == {name: size for name, (size, _) in SIZES.items()}
    pythia = [preset.name for preset in listed if preset.name.startswith("pythia/")]
    assert pythia == [name for name in SIZES if name.startswith("pythia/")]
    assert all(preset.summary for preset in listed)


@pytest.mark.parametrize("name", SIZES)
def test_preset(name: str) -> None:
    config = load_config([name])
    model = config.model_config()
    assert (model.num_parameters(), model.num_parameters_non_embedding()) == SIZES[name]
    ranks = (config.batch.train_batch_size or 0) // (config.batch.train_micro_batch_size_per_gpu or 1)
    assert config.batch_plan(ranks).grad_accum == 1
    assert schedule_of(config).lr_at(10**6) >= config.schedule.min_lr
    check_supported(config.replace(data_path="data/pile"), world_size=ranks)


def test_pythia_as_published() -> None:
    rates = {
        "14M": 1e-3,
        "31M": 1e-3,
        "70M": 1e-3,
        "160M": 6e-4,
        "410M": 3e-4,
        "1B": 3e-4,
        "1.4B": 2e-4,
        "2.8B": 1.6e-4,
    }
    rates |= {"6.9B": 1.2e-4, "12B": 1.2e-4}
    for size, lr in rates.items():
        config = load_config([f"pythia/{size}"])
        model = config.model_config()
        tokens = config.batch.train_batch_size * model.seq_length * config.train.train_iters  # type: ignore[operator]
        assert tokens == 299_892_736_000
        assert config.lr == lr
        assert config.schedule.min_lr == pytest.approx(lr / 10)
        assert config.compute_precision == ("bfloat16" if size == "1B" else "fp16")
        assert (model.activation, model.residual, model.rotary_pct) == ("gelu_tanh", "parallel", 0.25)
        assert config.model.init_method == ("normal" if size in ("6.9B", "12B") else "small_init")
        assert config.train.extra_save_iters == [0, *(2**i for i in range(10))]
