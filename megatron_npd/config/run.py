"""The settings of a whole run: those of its stages, of what is measured, and of its nodes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_npd.choices import PlatformName
from megatron_npd.config.cluster import ClusterConfig
from megatron_npd.config.settings import (
    AnnotateConfig,
    PackConfig,
    RolloutConfig,
    SelectConfig,
    require,
    require_not_negative,
)
from megatron_npd.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured on held-out prompts, before the run and after each round: the distance from the teacher, and
    the accuracy where there are reference responses."""

    prompts: str = ""
    """JSONL or Parquet of problems with reference responses; empty: no accuracy."""
    answer_regex: str = r"####\s*(-?[0-9.,]+)"
    """Its first group, at its last match, is the answer, in reference and response alike (GSM8K's form by default);
    empty: no accuracy, and the prompts need no reference responses."""
    max_tokens: int = 256
    """Longest response, in tokens."""
    held_out: int = 64
    """Prompts on which the KL to the teacher, the agreement of the most likely tokens and the response length are
    measured, and of which the report shows some: of eval.prompts, or else kept from training (at most a tenth); 0:
    none."""
    teacher: bool = False
    """Measure the teacher's accuracy too, once, on a server of its own that is started before the student's."""

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, "max_tokens", "at least 1", self.max_tokens, "256 is the default")
        require(self.held_out >= 0, "held_out", "at least 0", self.held_out, "0 measures nothing")


@dataclass(frozen=True, kw_only=True)
class NPDConfig(ClusterConfig):
    """A whole near-policy distillation run (METHOD section 1)."""

    run_dir: str = "runs/npd"
    """Directory of the run; running again there goes on where it stopped."""
    teacher: str = ""
    """Hugging Face directory of the teacher."""
    student: str = ""
    """Hugging Face directory of the student to start from."""
    prompts: str = ""
    """JSONL or Parquet of prompts (messages or prompt, optional response)."""
    responses: Literal["student", "teacher"] = "student"
    """Whose responses train: the student's own, or the teacher's (SeqKD)."""
    special_tokens_in_text: bool = False
    """Take special tokens that users' texts spell (<|im_end|>) for control tokens rather than for text."""
    updates: int = 1
    """Refreshes of the rollout servers, spread evenly over the run; there are updates + 1 rounds."""
    redo: bool = False
    """Where settings were changed: remove the results that depend on them, and make these anew; else they are named,
    and the run is refused."""
    max_lead: int = 0
    """Rounds that may be ahead of the trainer: so much older is the policy that generates a round, and stages run
    beside one another; 0: the newest policy, and one stage after another."""
    take_turns: bool = False
    """Launched servers, annotator and trainer take turns on the devices, one of them in memory at a time: each ends
    before the next begins, and starts again when it is needed. annotate.follow_seconds then needs servers elsewhere,
    beside which the teacher may run; else it comes after them."""
    exit_duration_in_mins: float = 0.0
    """Stop after so many minutes, as at SIGTERM and SIGUSR1: the trainer saves, and the same command goes on later; 0:
    run to the end."""
    platform: PlatformName = "auto"
    """Device platform; auto: cuda, npu or cpu, the first that is there."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Rollout stage."""
    annotate: AnnotateConfig = field(default_factory=AnnotateConfig)
    """Annotation stage."""
    select: SelectConfig = field(default_factory=SelectConfig)
    """Selection stage."""
    pack: PackConfig = field(default_factory=PackConfig)
    """Packing stage."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training stage; hf_model, data_path, save and load are set by the run."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""

    def __post_init__(self) -> None:
        require_not_negative(self, "exit_duration_in_mins")
        require(self.updates >= 0, "updates", "at least 0", self.updates, "1 or 2 are the paper's best")
        require(
            self.updates < self.train.train_iters,
            "updates",
            f"< train.train_iters ({self.train.train_iters})",
            self.updates,
            "a round needs a training step",
        )
        super().__post_init__()
        scored = self.annotate.backend != "none"
        require(
            scored or self.train.objective == "sft",
            "train.objective",
            "sft with annotate.backend none",
            self.train.objective,
            "distillation needs the teacher's scores",
        )
        require(
            self.annotate.unconditional or not scored or self.select.filter == "none",
            "annotate.unconditional",
            f"true with select.filter {self.select.filter}, which selects by IFD",
            self.annotate.unconditional,
            "or take filter none",
        )
        require(
            self.responses == "student" or self.updates == 0,
            "updates",
            "0 with responses teacher",
            self.updates,
            "the teacher stays as it is: more prompts or paths give more responses",
        )
        require(
            self.responses == "student" or not self.rollout.dataset_fraction,
            "rollout.dataset_fraction",
            "0 with responses teacher",
            self.rollout.dataset_fraction,
            "the student's responses alone are mixed with the data set's",
        )
        require(self.max_lead >= 0, "max_lead", "at least 0", self.max_lead, "0 waits for the newest policy")
        require(
            self.train.refresh != "by_lag" or self.rollout.measures_lag,
            "train.refresh",
            "another than by_lag without rollout.sampled_paths of the student at temperature 1 and top_p 1, of which "
            "alone the lag is known",
            self.train.refresh,
            "sample a path so, or use every_n",
        )
        serving = self.nnodes - self.training_nodes
        require(not (self.take_turns and self.max_lead), "take_turns", "false with max_lead", True, "stages overlap")
        require(
            not (serving and self.rollout.urls),
            "rollout.urls",
            "empty with server nodes",
            list(self.rollout.urls),
            "make all nodes train_nodes",
        )
        turns = self.take_turns and self.launcher == "torchrun"
        require(
            self.nnodes == 1 or bool(serving or self.rollout.urls or turns),
            "train_nodes",
            "fewer than nnodes, or take_turns set without Ray, or rollout.urls given",
            self.train_nodes,
            "the other nodes serve, or all nodes do in turn",
        )
        own = ("hf_model", "data_path", "save", "load", "metrics_path", "updates", "max_lead")
        for name in (*own, "exit_at_iteration", "exit_at_refresh", "exit_duration_in_mins"):
            given = getattr(self.train, name)
            require(not given, f"train.{name}", "left to the run", given, "drop it; run_dir says where all of it lies")
        require(
            self.annotate.backend != "vllm" or self.world_size == 1 or bool(self.annotate.urls),
            "annotate.urls",
            "given with backend vllm and several processes",
            "none",
            "start the teacher's servers with npd serve",
        )
