# SPDX-License-Identifier: Apache-2.0
"""Keys of the distributed engine: parallelism, precision, memory, DeepSpeed's own sections, launching."""

from dataclasses import dataclass
from typing import Any, Literal

from libneox.config.key import ignored, key, refused

Section = dict[str, Any] | None
_LAUNCH = "the launcher is started by you and ranks are found in the environment"
_MEMORY = "recomputed activations stay where they are; no number depends on it"
_STATE = "it is the state of a running process, not a setting"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the model and its states are spread over ranks."""

    model_parallel_size: int = key(1, "Tensor-parallel ranks.", minimum=0)
    pipe_parallel_size: int = key(0, "Pipeline stages; 0 and 1 both mean no pipeline.", minimum=0)
    pipe_partition_method: str = key(
        "type:transformer|mlp",
        "What is balanced between stages: parameters, uniform (the number of layers) or type:REGEX (the number of "
        "layers whose GPT-NeoX class, EmbeddingPipe, ParallelTransformerLayerPipe, NormPipe or ParallelLinearPipe, has "
        "REGEX in its name).",
    )
    pipe_schedule: Literal["1f1b", "dualpipev"] = key(
        "1f1b",
        "Order of work in a pipeline. dualpipev (DeepSeek-V3): each stage holds two parts of the model and is idle for "
        "a shorter time; a step needs at least twice as many micro-batches as there are stages. New.",
    )
    sequence_parallel: bool = key(False, "Split norms and dropouts along the sequence within a tensor-parallel group.")
    zero_optimization: Section = key(
        None,
        "ZeRO: {stage, ...}; stage 0 runs as stage 1, which computes the same.",
        sections={
            "stage": "0 to 3: what is split over data-parallel ranks (1 optimiser, 2 and gradients, 3 and weights)",
            "allgather_partitions": "passed to DeepSpeed",
            "allgather_bucket_size": "elements of one all-gather",
            "overlap_comm": "overlap reduction with the backward pass",
            "reduce_scatter": "reduce-scatter instead of all-reduce",
            "reduce_bucket_size": "elements of one reduction",
            "use_multi_rank_bucket_allreduce": "passed to DeepSpeed",
            "contiguous_gradients": "copy gradients to one buffer",
            "load_from_fp32_weights": "passed to DeepSpeed",
            "elastic_checkpoint": "passed to DeepSpeed",
            "grad_partitioned": "gone from DeepSpeed: refused",
            "cpu_offload": "old spelling of offload_optimizer: {device: cpu}",
            "offload_param": "{device, ...}: stage 3 weights in host memory or on disk",
            "offload_optimizer": "{device, ...}: optimiser states in host memory or on disk",
            "sub_group_size": "stage 3: elements updated at once",
            "prefetch_bucket_size": "stage 3",
            "param_persistence_threshold": "stage 3",
            "model_persistence_threshold": "stage 3",
            "max_live_parameters": "stage 3",
            "max_reuse_distance": "stage 3",
            "gather_16bit_weights_on_model_save": "stage 3",
            "module_granularity_threshold": "stage 3",
            "use_all_reduce_for_fetch_params": "stage 3",
            "stage3_prefetch_bucket_size": "stage 3",
            "stage3_param_persistence_threshold": "stage 3",
            "stage3_model_persistence_threshold": "stage 3",
            "stage3_max_live_parameters": "stage 3",
            "stage3_max_reuse_distance": "stage 3",
            "stage3_gather_16bit_weights_on_model_save": "stage 3",
            "stage3_gather_fp16_weights_on_model_save": "stage 3",
            "stage3_use_all_reduce_for_fetch_params": "stage 3",
            "ignore_unused_parameters": "passed to DeepSpeed",
            "legacy_stage1": "passed to DeepSpeed",
            "round_robin_gradients": "passed to DeepSpeed",
            "zero_hpz_partition_size": "ZeRO++",
            "zero_quantized_weights": "ZeRO++",
            "zero_quantized_nontrainable_weights": "ZeRO++",
            "zero_quantized_gradients": "ZeRO++",
            "zeropp_loco_param": "LoCo-ZeRO++, gone from DeepSpeed: refused",
            "mics_shard_size": "MiCS, gone from DeepSpeed: refused",
            "mics_hierarchical_params_gather": "MiCS, gone from DeepSpeed: refused",
            "memory_efficient_linear": "passed to DeepSpeed",
            "pipeline_loading_checkpoint": "passed to DeepSpeed",
            "override_module_apply": "passed to DeepSpeed",
            "log_trace_cache_warnings": "passed to DeepSpeed",
        },
    )
    engine: Literal["auto", "deepspeed", "plain"] = key(
        "auto",
        "plain holds whole states on every rank; auto is plain for one rank at stage 0 or 1 and for optimizers that "
        "look at the shape of matrices, else deepspeed. New.",
    )
    fp32_allreduce: bool = key(False, "Reduce gradients in float32.")
    distributed_backend: str = ignored(
        "nccl", "Backend of torch.distributed.", "it follows from the device: NCCL on GPUs, gloo on a CPU"
    )
    lazy_mpu_init: bool = ignored(False, "Delay the start of torch.distributed.", "it starts once, when needed")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats."""

    precision: Literal["fp16", "fp32", "bfloat16"] | None = key(
        None,
        "Format of weights and activations; default fp32, or what fp16.enabled or bf16.enabled says.",
        synonyms={"bf16": "bfloat16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"},
    )
    fp16: Section = key(
        None,
        "Loss scaling of fp16.",
        sections={
            "enabled": "true is the same as precision: fp16",
            "type": "no meaning; written by GPT-NeoX",
            "fp16": "no meaning; found in published files",
            "precision": "no meaning; found in published files",
            "auto_cast": "passed to DeepSpeed",
            "loss_scale": "fixed loss scale; 0 is dynamic",
            "initial_scale_power": "first dynamic scale is 2 to this power; default 16",
            "loss_scale_window": "steps without overflow before the scale doubles; default 1000",
            "hysteresis": "overflows before the scale is halved; default 2",
            "consecutive_hysteresis": "refill hysteresis at each step without overflow",
            "min_loss_scale": "smallest scale; default 1",
            "fp16_master_weights_and_grads": "passed to DeepSpeed",
        },
    )
    bf16: Section = key(
        None,
        "bfloat16 options.",
        sections={
            "enabled": "true is the same as precision: bfloat16",
            "immediate_grad_update": "passed to DeepSpeed",
            "check_grad_overflow": "passed to DeepSpeed",
            "bf16_master_weights_and_grads": "passed to DeepSpeed",
            "bf16_optimizer_states": "passed to DeepSpeed",
        },
    )
    amp: Section = refused(None, "Apex mixed precision.", "Apex amp is gone from DeepSpeed: set precision")
    data_types: Section = key(
        None, "{grad_accum_dtype}: format gradients are summed in.", sections={"grad_accum_dtype": "fp32, fp16 or bf16"}
    )
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = key(
        None, "Format of gradients on the wire.", synonyms={"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}
    )
    fp16_lm_cross_entropy: bool = ignored(False, "Loss in fp16.", "the loss is always computed in float32")
    loss_scale: float | None = ignored(None, "Fixed loss scale.", "GPT-NeoX never reads it: use fp16.loss_scale")
    dynamic_loss_scale: bool | None = ignored(None, "Dynamic loss scale.", "use fp16.loss_scale: 0")
    loss_scale_window: float = ignored(1000.0, "Loss scale window.", "use fp16.loss_scale_window")
    hysteresis: int = ignored(2, "Loss scale hysteresis.", "use fp16.hysteresis")
    min_scale: float = ignored(1.0, "Smallest loss scale.", "use fp16.min_loss_scale")


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Activation checkpointing: memory for time."""

    checkpoint_activations: bool = key(False, "Keep only the inputs of blocks and recompute the rest.")
    checkpoint_policy: Literal["auto", "none", "selective", "full"] = key(
        "auto",
        "What is kept: everything, the results of products and attention (and the cheap rest is recomputed), or the "
        "inputs of blocks. auto: full with checkpoint_activations; else none, but on a GPU (one rank to a model) the "
        "first of the three that fits its memory. New.",
    )
    checkpoint_num_layers: int = key(1, "Blocks recomputed together.", minimum=1)
    activation_checkpointing: Section = ignored(None, "DeepSpeed's section.", "use checkpoint_activations")
    partition_activations: bool = ignored(False, "Split kept inputs over tensor-parallel ranks.", _MEMORY)
    contiguous_checkpointing: bool = ignored(False, "Kept inputs in one buffer.", _MEMORY)
    checkpoint_in_cpu: bool = ignored(False, "Kept inputs in host memory.", _MEMORY)
    synchronize_each_layer: bool = ignored(False, "Synchronise after each block.", _MEMORY)
    profile_backward: bool = ignored(False, "Time recomputation.", "use profile")
    deepspeed_activation_checkpointing: bool = ignored(True, "Use DeepSpeed's code.", "there is one way only")


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """Sections that go to DeepSpeed as they are, and those of its features that are refused."""

    deepspeed: bool = refused(True, "Train with DeepSpeed.", "DeepSpeed is the engine")
    deepspeed_extra_args: Section = key(None, "Further top-level keys of DeepSpeed's own config.")
    prescale_gradients: bool = key(False, "Divide gradients before reducing them.")
    gradient_predivide_factor: float = key(1.0, "Divisor of prescale_gradients.", above=0)
    sparse_gradients: bool = refused(False, "Sparse embedding gradients.", "the embedding's gradient is dense")
    steps_per_print: int = key(10, "Every so many steps wall_clock_breakdown prints.", minimum=1)
    wall_clock_breakdown: bool = key(False, "DeepSpeed prints times of forward, backward and step.")
    dump_state: bool = key(False, "DeepSpeed prints its state and settings at start.")
    flops_profiler: Section = key(
        None, "DeepSpeed's profiler: {enabled, profile_step, ...} prints operations and times of each module, once."
    )
    tensorboard: Section = key(
        None, "DeepSpeed's TensorBoard monitor, of what it knows: rate and times. See tensorboard_dir."
    )
    wandb: Section = key(None, "DeepSpeed's Weights & Biases monitor, likewise. See use_wandb.")
    csv_monitor: Section = key(None, "DeepSpeed's CSV monitor, likewise. RUN/metrics.jsonl has everything.")
    comms_logger: Section = key(None, "DeepSpeed's log of communication: {enabled: true} prints a summary at the end.")
    curriculum_learning: Section = key(
        None,
        "Sequence length that grows: in each step samples are cut to its length, what is cut off is not seen; "
        "validation has full length. `tokens` counts what was used.",
        sections={
            "enabled": "true or false",
            "curriculum_type": "seqlen",
            "min_difficulty": "first length",
            "max_difficulty": "last length, at most seq_length",
            "schedule_type": "fixed_linear, fixed_root or fixed_discrete",
            "schedule_config": "fixed_linear: total_curriculum_step, difficulty_step (lengths are multiples of it); "
            "fixed_root: root_degree too; fixed_discrete: difficulty, the lengths, and max_step, where each but the "
            "last one ends",
        },
    )
    autotuning: Section = key(None, "DeepSpeed's autotuner.")
    autotuning_run: str | None = key(None, "tune or run.")
    scheduler: Section = refused(
        None, "DeepSpeed's schedule.", "lr_decay_style, warmup and min_lr describe the schedule"
    )
    sparse_attention: Section = refused(
        None, "DeepSpeed's sparse attention.", "use attention_config; DeepSpeed's kernels need a Triton long gone"
    )
    data_efficiency: Section = refused(None, "DeepSpeed's data sampling.", "the order of samples is this project's own")
    elasticity: Section = refused(
        None, "DeepSpeed's elastic batch.", "a run continues at any number of ranks without it"
    )
    compression_training: Section = refused(None, "DeepSpeed's compression.", "it replaces layers of the model")
    checkpoint: Section = refused(None, "DeepSpeed's checkpoints.", "checkpoints have a format of their own")
    deepscale: bool = refused(False, "Old name of DeepSpeed.", "DeepSpeed is the engine")
    deepscale_config: str | None = refused(None, "File for deepscale.", "DeepSpeed is the engine")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Starting processes, which launchers do. The warning names the equivalent command line."""

    hostfile: str | None = ignored(None, "Hosts and slots.", _LAUNCH)
    include: str | None = ignored(None, "Hosts and slots to use.", _LAUNCH)
    exclude: str | None = ignored(None, "Hosts and slots to leave out.", _LAUNCH)
    num_nodes: int = ignored(-1, "Hosts to use.", _LAUNCH)
    num_gpus: int | None = ignored(None, "Processes a host.", _LAUNCH)
    master_port: int = ignored(29500, "Port of the rendezvous.", _LAUNCH)
    master_addr: str | None = ignored(None, "Host of the rendezvous.", _LAUNCH)
    launcher: Literal["pdsh", "openmpi", "mvapich", "slurm", "mpich", "impi", "jsrun", "flux"] = ignored(
        "pdsh", "What starts processes.", _LAUNCH
    )
    force_multi: bool = ignored(False, "Multi-node launcher for one node.", _LAUNCH)
    no_ssh_check: bool = ignored(False, "Do not probe hosts.", _LAUNCH)
    deepspeed_mpi: bool = ignored(False, "Find ranks through MPI.", _LAUNCH)
    deepspeed_slurm: bool = ignored(False, "Find ranks through Slurm.", _LAUNCH)
    comment: str | None = ignored(None, "Slurm comment.", _LAUNCH)
    account: str | None = ignored(None, "Slurm account.", _LAUNCH)
    global_num_gpus: int | None = key(None, "Ranks that --dry-run assumes.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Internal:
    """State that GPT-NeoX kept among its settings."""

    world_size: int | None = refused(None, "Number of ranks.", _STATE)
    rank: int | None = refused(None, "Rank.", _STATE)
    local_rank: int | None = refused(None, "Rank on this host.", _STATE)
    is_pipe_parallel: bool = refused(False, "Whether there is a pipeline.", _STATE)
    do_train: bool | None = refused(None, "Whether there is training data.", _STATE)
    do_valid: bool | None = refused(None, "Whether there is validation data.", _STATE)
    do_test: bool | None = refused(None, "Whether there is test data.", _STATE)
    user_script: str | None = refused(None, "Script to start.", "start neox-train, neox-eval or neox-gen instead")
    config_files: dict[str, str] | None = ignored(None, "Texts of the config files.", _STATE)
    git_hash: str | None = ignored(None, "Commit of GPT-NeoX.", _STATE)
    curriculum_seqlen: int = refused(0, "Present length of the curriculum.", _STATE)
    comet_experiment: str | None = refused(None, "Comet object.", _STATE)
