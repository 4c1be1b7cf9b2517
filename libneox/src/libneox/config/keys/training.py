# SPDX-License-Identifier: Apache-2.0
"""Keys of the training run: length, batch, optimiser, schedule, objective, checkpoints."""

from dataclasses import dataclass
from typing import Any, Literal

from libneox.config.key import ignored, key, refused


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length of the run, evaluation on the way, saving and loading."""

    train_iters: int | None = key(None, "Optimiser steps of the run.", minimum=0)
    train_epochs: int | None = key(None, "Length in passes over the data; excludes train_iters.", minimum=1)
    seed: int = key(1234, "Seed of the weights, of dropout and of the order of samples.", minimum=0)
    exit_interval: int | None = key(None, "Save and stop at the first step that this divides.", minimum=1)
    eval_interval: int = key(1000, "Validate every so many steps.", minimum=1)
    eval_iters: int = key(100, "Global batches of one validation.", minimum=0)
    eval_tasks: list[str] | None = key(
        None,
        "Tasks that neox-eval, which must be installed, does with the checkpoint of every eval_interval-th step, which "
        "is saved for it, and of the last: names, task files, data files. Training waits.",
    )
    eval_results_prefix: str = key(
        "", "Results of eval_tasks go to PREFIX_eval_results_step_N.json; default: to the run directory."
    )
    char_level_ppl: bool = key(
        False, "Validation reports perplexity per character too (valid_char_ppl); special tokens have none."
    )

    save: str | None = key(None, "Run directory: checkpoints, metrics, log.")
    checkpoint_factor: int | float | None = key(
        None, "Save every so many steps (linear), or at powers of this (log).", above=0
    )
    checkpoint_scale: Literal["linear", "log"] = key("linear", "Whether checkpoint_factor is a period or a base.")
    extra_save_iters: list[int] | None = key(None, "Further steps to save at; 0 saves the untrained model.")
    keep_last_n_checkpoints: int | None = key(
        None, "Keep the newest n; those of extra_save_iters are kept too.", minimum=1
    )
    async_save: bool = key(
        False,
        "Copy the values to host memory and write a checkpoint while training goes on. The files are the same; a rank "
        "needs host memory for its share of them. New.",
    )
    on_save_error: Literal["stop", "continue"] = key(
        "stop",
        "When a checkpoint cannot be written: stop with 74, or warn and train on to the next one. The last one of a "
        "run always stops it. New.",
    )
    replica_check_interval: int | None = key(
        None,
        "Every so many steps compare the weights that data-parallel ranks hold, and end with 81, naming the rank, if "
        "one differs. Not with ZeRO stage 3, which keeps no copies. New.",
        minimum=1,
    )
    s3_path: str | None = key(
        None, "Copy each checkpoint to this address too, s3://BUCKET/FOLDER or another that fsspec opens."
    )
    s3_chunk_size: int = key(
        104857600, "Bytes of one part of an upload to s3:// or gs://; S3 takes 5 MiB and more.", minimum=5 * 2**20
    )
    load: str | None = key(None, "Checkpoint, run directory or address (see s3_path) to begin from.")
    iteration: int | None = key(
        None, "Load this step instead of the newest; if it is one of the run's own, go back to it.", minimum=0
    )
    finetune: bool = key(False, "Load the weights alone and start at step 0.")
    no_load_optim: bool = key(False, "Start with a fresh optimiser.")
    no_load_rng: bool = key(False, "Continue with other random numbers than the checkpoint's run would have used.")
    no_save_optim: bool = key(False, "Save the weights without the optimiser.")
    no_save_rng: bool = ignored(
        False, "Save without random states.", "random numbers follow from seed and step, so none are saved"
    )
    checkpoint_validation_with_forward_pass: bool = key(
        False,
        "Store the loss of a fixed input, in eight parts, in each checkpoint and compare after loading: 81 if they "
        "differ.",
    )
    override_lr_scheduler: bool = key(False, "On resume the schedule of the config holds, without a word.")
    use_checkpoint_lr_scheduler: bool = key(False, "On resume the schedule of the checkpoint holds.")
    adlr_autoresume: bool = refused(False, "Resume through a cluster service.", "only NVIDIA's own cluster has it")
    adlr_autoresume_interval: int = ignored(1000, "Interval of adlr_autoresume.", "see adlr_autoresume")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data-parallel ranks.

    What is not given is inferred from the rest.
    """

    train_batch_size: int | None = key(None, "Samples of one optimiser step, over all ranks.", minimum=1)
    train_micro_batch_size_per_gpu: int | None = key(None, "Samples of one forward pass on one rank.", minimum=1)
    gradient_accumulation_steps: int | None = key(None, "Forward passes of one optimiser step.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and what is done to gradients."""

    optimizer: dict[str, Any] | None = key(
        None,
        "Optimiser as {type, params}; params.lr is the learning rate. Default adam with lr 0.001, betas 0.9 and 0.999, "
        "eps 1e-8.",
        sections={
            "type": "adam, adamw, cpu_adam, cpu_torch_adam, sgd, lion, sm3, madgrad_wd, muon or adafactor",
            "params": "arguments of the optimiser: lr, betas, eps, ...",
        },
    )
    use_bnb_optimizer: bool = key(
        False,
        "Adam with moments of 8 bits, by bitsandbytes, which must be installed (neox-train[bitsandbytes]); type adam "
        "or adamw. Without ZeRO, tensor parallelism and pipelines. The model stays as it is.",
    )
    weight_decay: float = key(0.1, "Decoupled weight decay; norms and biases have none.", minimum=0)
    gradient_clipping: float = key(1.0, "Largest global L2 norm of the gradient; 0 switches clipping off.", minimum=0)
    loss_weighting: Literal["micro_batches", "tokens"] = key(
        "micro_batches",
        "Loss of a step: the mean of its micro-batches' means, as in GPT-NeoX, or the mean over all of its tokens that "
        "count, which is the same however the batch is cut. They differ where tokens are masked. New.",
    )
    z_loss: float = key(
        0.0, "Weight of the squared log of the softmax's denominator (reward model: squared score).", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class LrSchedule:
    """The learning rate over the run."""

    lr_decay_style: Literal["constant", "linear", "cosine", "exponential", "wsd", "inverse_sqrt"] = key(
        "linear", "Shape of the decay; wsd (constant, then a decay at the end) and inverse_sqrt are new."
    )
    lr_decay_iters: int | None = key(None, "Step at which the decay ends; default train_iters.", minimum=1)
    lr_decay_fraction: float | None = key(None, "The same as a share of train_iters; lr_decay_iters wins.", above=0)
    min_lr: float = key(0.0, "The learning rate never falls below this.", minimum=0)
    warmup: float = key(0.01, "Share of the horizon over which the learning rate rises.", minimum=0, maximum=1)
    wsd_decay_fraction: float = key(
        0.1, "wsd: share of the horizon that the final decay takes. New.", above=0, maximum=1
    )
    wsd_decay_style: Literal["linear", "cosine", "sqrt"] = key("linear", "wsd: shape of the final decay. New.")


@dataclass(frozen=True, kw_only=True)
class Post:
    """Objectives after pre-training."""

    train_impl: Literal["normal", "dpo", "rm", "kto", "reinforce"] = key("normal", "What is optimised.")
    dpo_beta: float = key(0.1, "DPO: strength of the pull to the reference.", above=0)
    dpo_fp32: bool = key(True, "DPO: log-probabilities in float32.")
    dpo_reference_free: bool = key(False, "DPO without a reference model.")
    kto_beta: float = key(0.1, "KTO: strength of the pull to the reference.", above=0)
    kto_fp32: bool = key(True, "KTO: log-probabilities in float32.")
    kto_desirable_weight: float = key(1.0, "KTO: weight of good answers.", minimum=0)
    kto_undesirable_weight: float = key(1.0, "KTO: weight of bad answers.", minimum=0)
    fp32_reinforce: bool = key(True, "REINFORCE: log-probabilities in float32.")
    kl_impl: Literal["abs", "mse", "kl", "full"] = key("mse", "REINFORCE: estimator of the divergence.")
    kl_div_beta: float = key(0.1, "REINFORCE: weight of the divergence.", minimum=0)
    reinforce_leave_one_out: bool = key(False, "REINFORCE: baseline is the mean of the other answers to the prompt.")
    serve_model_weights: bool = key(False, "Offer the weights to a local generation server.")
    weight_server_port: int | list[int] = key(6000, "Port of that offer.")
    precompute_model_name: str | None = key(None, "Suffix of files with reference log-probabilities.")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Text generation with neox-gen: what acts is the default of a checkpoint, the rest are its arguments."""

    temperature: float = key(0.0, "Divides logits; 0 with top_k and top_p 0 is greedy.", minimum=0)
    top_p: float = key(0.0, "Sample from the smallest set with this probability; 0 is off.", minimum=0, maximum=1)
    top_k: int = key(0, "Sample from the k likeliest tokens; 0 is off.", minimum=0)
    maximum_tokens: int = key(64, "New tokens of one answer.", minimum=0)
    text_gen_type: Literal["unconditional", "input-file", "interactive", "precompute"] | None = ignored(
        None, "Mode of generation.", "neox-gen reads prompts, or takes --number or --interactive"
    )
    num_samples: int = ignored(1, "Answers without a prompt.", "neox-gen takes --number")
    prompt_end: str = ignored("\n", "Separates prompts of sample_input_file.", "neox-gen takes --prompt-end")
    sample_input_file: str | None = ignored(None, "File of prompts.", "neox-gen takes a file or reads stdin")
    sample_output_file: str = ignored("samples.txt", "File of answers.", "neox-gen writes to stdout")
    return_logits: bool = ignored(False, "Answers carry their logits.", "neox-gen takes --logprobs")
    recompute: bool = ignored(False, "Generate without a KV cache.", "the text is the same with it")
