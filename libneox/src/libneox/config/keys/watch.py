# SPDX-License-Identifier: Apache-2.0
"""Keys of logging, monitoring and profiling."""

from dataclasses import dataclass
from typing import Any

from libneox.config.key import key


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is reported of a run, and where to. RUN/metrics.jsonl is always written."""

    log_interval: int = key(100, "A progress line every so many steps.", minimum=1)
    log_dir: str | None = key(None, "Directory for a copy of stderr: a file for each rank, appended to.")
    tensorboard_dir: str | None = key(
        None, "Write TensorBoard files here; one directory a run. Needs neox-train[tensorboard]."
    )
    use_wandb: bool | None = key(None, "Report to Weights & Biases; null is no. Needs neox-train[wandb].")
    wandb_project: str = key("neox", "Weights & Biases project.")
    wandb_group: str | None = key(None, "Weights & Biases group.")
    wandb_run_name: str | None = key(None, "Weights & Biases run name; default: one it makes up.")
    wandb_team: str | None = key(None, "Weights & Biases team or user the run belongs to.")
    wandb_host: str = key("https://api.wandb.ai", "Weights & Biases server; default: that of its own login.")
    wandb_init_all_ranks: bool = key(False, "A Weights & Biases run for each rank, in one group.")
    use_comet: bool | None = key(None, "Report to Comet; null is no. Needs neox-train[comet].")
    comet_workspace: str | None = key(None, "Comet workspace.")
    comet_project: str | None = key(None, "Comet project.")
    comet_experiment_name: str | None = key(None, "Comet experiment name.")
    comet_tags: list[str] | None = key(None, "Comet tags.")
    comet_others: dict[str, Any] | None = key(None, "Further fields of a Comet experiment.")
    peak_theoretical_tflops: float | None = key(
        None, "Peak of one device, for MFU; default: what a matrix product reaches at start.", above=0
    )
    log_param_norm: bool = key(
        False, "L2 norm of each parameter in metrics.jsonl (param_norm), every log_interval steps."
    )
    log_grad_norm: bool = key(False, "Norm of each gradient before clipping (tensor_grad_norm).")
    log_grad_pct_zeros: bool = key(False, "Per cent of zeros in each gradient (grad_pct_zeros).")
    log_optimizer_states: bool = key(False, "Norm of each state tensor of the optimiser (optimizer_state_norm).")
    log_gradient_noise_scale: bool = key(False, "Estimate the gradient noise scale (noise_scale, in samples).")
    gradient_noise_scale_n_batches: int = key(
        5, "Global batches of the large-batch estimate, so many steps are one estimate.", minimum=2
    )
    gradient_noise_scale_cpu_offload: bool = key(False, "Keep the noise scale's gradients in host memory.")
    memory_profiling: bool = key(
        False, "Record what a GPU's allocator does in the steps of profile_step_start and _stop, as JSON for each rank."
    )
    memory_profiling_path: str | None = key(None, "Directory of memory_profiling; default RUN/memory.")
    profile: bool = key(
        False,
        "Trace some steps with torch.profiler, to RUN/profile, a file for each rank; under nsys -c cudaProfilerApi "
        "only mark them for it.",
    )
    profile_step_start: int = key(10, "First profiled step, counted from 1.", minimum=0)
    profile_step_stop: int = key(12, "First step not profiled any more.", minimum=0)
