"""The settings of training, as frozen dataclasses: the loss, the optimizer, and a run of ``npd train``.

Names are Megatron's where Megatron has the thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from megatron_npd.choices import DivergenceName, Impl, Mode, ObjectiveName, PlatformName, RefreshRule
from megatron_npd.config.settings import LayoutConfig, require, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises."""

    objective: ObjectiveName = "distill"
    """What is minimised: sft, the cross-entropy of the responses; distill, (1 - kd_alpha) * CE + kd_alpha * KD."""
    kd_alpha: float = 0.9
    """Weight of KD in distill; 0 trains like sft and shows KD beside it."""
    kd_mode: Mode = "tail"
    """What becomes of the probability outside the teacher's top-k (METHOD section 2)."""
    kd_divergence: DivergenceName = "forward_kl"
    """Divergence of student and teacher; those but forward_kl need kd_mode tail or renorm_both."""
    kd_beta: float = 0.5
    """Teacher's share of the mixture in jsd."""
    kd_skew: float = 0.1
    """Share of the first distribution in the second one of skew_kl and skew_reverse_kl."""
    kd_temperature: float = 1.0
    """Divides both sets of logits in KD, which is multiplied by its square; other than 1 for the renormalised modes."""
    fused_linear_loss: bool = False
    """Fuse the output layer into the loss: the logits are never whole, but from forward to backward there is a float32
    gradient of the output layer's weight."""
    loss_impl: Impl = "auto"
    """Implementation of the loss; auto: triton on CUDA where it is installed, else torch."""

    def __post_init__(self) -> None:
        require(0 <= self.kd_alpha <= 1, "kd_alpha", "in [0, 1]", self.kd_alpha, "1 is KD alone")

    def kd_settings(self) -> dict[str, Any]:
        """The ``kd_`` fields under the names that the loss and ``ops.arguments.check_objective`` take."""
        names = ("alpha", "mode", "divergence", "beta", "skew", "temperature")
        return {name: getattr(self, f"kd_{name}") for name in names}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-4
    """Highest learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up, the first with lr / (lr_warmup_iters + 1)."""
    weight_decay: float = 0.01
    """AdamW weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """AdamW first-moment decay."""
    adam_beta2: float = 0.95
    """AdamW second-moment decay."""
    adam_eps: float = 1e-8
    """AdamW epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""

    def __post_init__(self) -> None:
        require_not_negative(self, "lr_warmup_iters", "clip_grad")
        require(0 < self.lr < inf, "lr", "> 0 and finite", self.lr, "1e-4 is the default")
        for name in ("adam_beta1", "adam_beta2"):
            require(
                0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name), "0.9 and 0.95 are the defaults"
            )
        require(0 < self.adam_eps < inf, "adam_eps", "> 0 and finite", self.adam_eps, "1e-8 is the default")
        require(
            0 <= self.weight_decay < inf, "weight_decay", "at least 0 and finite", self.weight_decay, "0.01 is usual"
        )
        require(0 <= self.min_lr <= self.lr, "min_lr", f"in [0, lr = {self.lr}]", self.min_lr, "lower it")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LayoutConfig, LossConfig, OptimizerConfig):
    """One training run of ``npd train``: SFT or distillation."""

    hf_model: str = ""
    """Hugging Face directory of the starting weights, configuration and tokenizer."""
    data_path: str = ""
    """A packs directory, a schedule.jsonl that says which packs train from which row on, or the directory of a run,
    whose rounds train as their packs are sealed."""
    save: str = ""
    """Directory under which checkpoints iter_0000100/ are written; empty: none."""
    load: str = ""
    """Directory whose newest whole checkpoint the run starts from while save holds none; empty: hf_model starts it."""
    save_interval: int = 0
    """Steps between checkpoints that are kept; 0: only the one at the end."""
    save_interval_in_mins: float = 10.0
    """Minutes of training after which one is saved between those; it is removed when the next is whole. 0: none."""
    most_recent_k: int = 0
    """Checkpoints that are kept at most, beside those that become a policy: the newest ones; 0: all."""
    async_save: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory; one that becomes a policy is waited
    for."""
    change_global_batch_size: bool = False
    """Go on from a checkpoint with another global batch size, after the rows that it consumed; else it is refused. For
    npd train alone: a run's batch size is part of its recipe."""
    log_interval: int = 10
    """Steps between log lines."""
    log_entropy: bool = False
    """Log the student's entropy over the whole vocabulary too, one more operation on the logits."""
    profile: bool = False
    """Profile some steps with torch's profiler; profile/rank-0000.json.gz beside the metrics opens in Perfetto."""
    profile_step_start: int = 10
    """First step that is profiled."""
    profile_step_end: int = 12
    """First step after them that is not."""
    profile_ranks: tuple[int, ...] = (0,)
    """Ranks that profile."""
    train_iters: int = 100
    """Optimizer steps of the whole run; the learning-rate schedule spans them."""
    exit_at_iteration: int = 0
    """Stop, with a checkpoint, after this step, and leave the rest to a later call; 0: go on to train_iters."""
    exit_at_refresh: bool = False
    """Stop at each checkpoint that becomes the next policy; npd run sets it where stages take turns on a device."""
    exit_duration_in_mins: float = 0.0
    """Stop, with a checkpoint, after the step that ends later than so many minutes from the start; 0: go on. SIGTERM
    and SIGUSR1 do the same at once."""
    deterministic_mode: bool = False
    """Compute the same bits each time in the same layout: deterministic operations of torch and of its libraries alone,
    slower on a GPU; there CUBLAS_WORKSPACE_CONFIG and NCCL_ALGO are set where they are not."""
    max_skipped_steps: int = 3
    """Steps in a row whose loss or gradient norm is not finite, after which the run stops; before, each is skipped, and
    the ids of its samples are written to skipped.jsonl beside the metrics."""

    refresh: RefreshRule = "even"
    """When a checkpoint becomes the next policy: never before the end; at updates + 1 steps spread evenly; every
    refresh_interval steps; once the policy lag's moving average passes refresh_lag, refresh_interval steps after the
    last time at the earliest."""
    updates: int = 0
    """Policies before the run's last one, at most."""
    refresh_interval: int = 0
    """Steps between policies, for every_n and by_lag."""
    refresh_lag: float = 0.1
    """Policy lag (k3) that asks for a new policy, for by_lag, in nats per token; the paper's bound is 0.1."""
    replay: float = 0.0
    """Share of the rows, from the second round on, that come from the rounds before, drawn from all of them alike; the
    policy lag is then that of all rows."""
    max_lead: int = 0
    """Rounds that may be generated ahead of the trainer; 0: it waits at each new policy for the packs made with it."""

    global_batch_size: int = 8
    """Rows of one optimizer step."""
    global_batch_tokens: int = 0
    """Tokens of one optimizer step; where given, it sets global_batch_size = global_batch_tokens / row length."""
    balance_attention: bool = True
    """Deal a global batch's rows to data-parallel ranks by attention cost, so that they finish together."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks along the sequence."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over the data- and context-parallel ranks."""
    virtual_pipeline_model_parallel_size: int = 1
    """Parts of its depth that a pipeline stage computes in turn, for shorter pipeline bubbles: Megatron's interleaved
    schedule; 1: one."""
    num_layers_per_virtual_pipeline_stage: int = 0
    """The same by the layers of such a part, Megatron's other name for it; 0: left to
    virtual_pipeline_model_parallel_size."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """What the backward computes anew instead of keeping it: selective, the modules of recompute_modules; full, whole
    layers."""
    recompute_modules: tuple[Literal["core_attn", "mlp"], ...] = ("core_attn",)
    """Parts of each layer that selective computes anew."""
    recompute_method: Literal["none", "uniform", "block"] = "none"
    """With full: uniform keeps the input of every recompute_num_layers layers; block computes the first
    recompute_num_layers layers of each stage anew, and keeps all of the others."""
    recompute_num_layers: int = 0
    """Layers, as recompute_method has it."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over the data-parallel ranks while the backward goes on."""
    overlap_param_gather: bool = False
    """Gather the parameters that the distributed optimizer has updated while the next forward goes on."""

    seed: int = 1234
    """Seed of the row order (and of dropout, where a model has it)."""

    metrics_path: str = ""
    """JSONL file of the metrics of each step; empty: metrics.jsonl under save."""
    tensorboard_dir: str = ""
    """Directory of TensorBoard event files; empty: none."""
    wandb_project: str = ""
    """Weights & Biases project, where one save directory is one run; empty: none. WANDB_MODE=offline works, and its
    files lie in WANDB_DIR, or under save where that is not set."""
    wandb_exp_name: str = ""
    """Weights & Biases run name."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""

    def __post_init__(self) -> None:
        LayoutConfig.__post_init__(self)
        LossConfig.__post_init__(self)
        OptimizerConfig.__post_init__(self)
        require_positive(self, "train_iters", "global_batch_size", "log_interval", "max_skipped_steps")
        self._check_parallel()
        require(0 <= self.replay < 1, "replay", "in [0, 1)", self.replay, "0 trains on the newest round alone")
        by_lag = self.refresh == "by_lag"
        require(not (by_lag and self.replay), "replay", "0 with refresh by_lag", self.replay, "old rows lag for ever")
        require_not_negative(self, "save_interval", "save_interval_in_mins", "exit_at_iteration", "global_batch_tokens")
        require_not_negative(self, "updates", "max_lead", "refresh_interval", "exit_duration_in_mins", "most_recent_k")
        require(
            0 < self.profile_step_start < self.profile_step_end,
            "profile_step_start",
            f"from 1 to profile_step_end - 1 ({self.profile_step_end - 1})",
            self.profile_step_start,
            "give a window of steps",
        )
        needs_interval = self.refresh in ("every_n", "by_lag")
        require(
            not needs_interval or self.refresh_interval > 0,
            "refresh_interval",
            f"at least 1 with refresh {self.refresh}",
            self.refresh_interval,
            "give the steps between policies",
        )
        require(
            self.lr_warmup_iters < self.train_iters,
            "lr_warmup_iters",
            f"< train_iters ({self.train_iters})",
            self.lr_warmup_iters,
            "shorten the warm-up",
        )

    def _check_parallel(self) -> None:
        require_positive(self, "virtual_pipeline_model_parallel_size")
        require_not_negative(self, "num_layers_per_virtual_pipeline_stage")
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        whole = self.pipeline_model_parallel_size > 1 == self.virtual_pipeline_model_parallel_size and not first + last
        require(
            whole or not self.num_layers_per_virtual_pipeline_stage,
            "num_layers_per_virtual_pipeline_stage",
            "0 without pipeline_model_parallel_size, with uneven stages and with virtual_pipeline_model_parallel_size",
            self.num_layers_per_virtual_pipeline_stage,
            "virtual_pipeline_model_parallel_size goes with uneven stages",
        )
        require(
            self.virtual_pipeline_model_parallel_size == 1 or self.pipeline_model_parallel_size > 1,
            "virtual_pipeline_model_parallel_size",
            "1 without pipeline_model_parallel_size",
            self.virtual_pipeline_model_parallel_size,
            "it cuts the stages of a pipeline",
        )
        full, method, layers = self.recompute_granularity == "full", self.recompute_method, self.recompute_num_layers
        rule = "uniform or block with recompute_granularity full" if full else "none without recompute_granularity full"
        require((method != "none") == full, "recompute_method", rule, method, "uniform keeps least")
        rule = "at least 1 with recompute_granularity full" if full else "0 without recompute_granularity full"
        require(
            (layers > 0) == full and layers >= 0, "recompute_num_layers", rule, layers, "1 keeps each layer's input"
        )
        gathers, fused = self.overlap_param_gather, self.fused_linear_loss
        sharded = self.use_distributed_optimizer and self.overlap_grad_reduce
        rule = "false without use_distributed_optimizer and overlap_grad_reduce"
        require(sharded or not gathers, "overlap_param_gather", rule, gathers, "switch them on")
        # The fused loss takes the output layer's weight past the module whose forward would wait for it.
        require(not (gathers and fused), "overlap_param_gather", "false with fused_linear_loss", gathers, "drop one")

    @property
    def pipeline_split(self) -> dict[str, int]:
        return super().pipeline_split | {"virtual": self.virtual_pipeline_model_parallel_size}

    @property
    def transformer_options(self) -> dict[str, Any]:
        options = super().transformer_options
        if self.recompute_granularity == "full":
            options |= {"recompute_method": self.recompute_method, "recompute_num_layers": self.recompute_num_layers}
        elif self.recompute_granularity == "selective":
            options |= {"recompute_modules": list(self.recompute_modules)}
        if self.recompute_granularity != "none":
            options["recompute_granularity"] = self.recompute_granularity
        if self.deterministic_mode:
            options["deterministic_mode"] = True
        return options
