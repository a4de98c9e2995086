"""What `npd plan` is told beside a run's settings: the machine, the work, and what share of a data sheet is reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_npd.choices import GpuName
from megatron_npd.config.run import NPDConfig
from megatron_npd.config.settings import require

_PROMPT_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a plan takes for granted; all of it is printed beside the results."""

    train_share: float = 0.4
    """Share of the peak FLOP/s that forward and backward of training reach on one device; Megatron-LM tells of 0.41 to
    0.48 on H100 with fused kernels, which this trainer has in part."""
    prefill_share: float = 0.4
    """The same of forwards alone: annotation, and the prompts of the rollouts."""
    memory_share: float = 0.9
    """Share of a device's memory that a stage may fill; the rest is for the context, communicators and fragments. Also
    what a vLLM server takes (its --gpu-memory-utilization)."""
    bandwidth_share: float = 0.6
    """Share of the memory's bandwidth that decoding reaches, and the optimizer's update."""
    link_share: float = 0.7
    """Share of the bandwidth between devices, and between nodes, that collectives reach."""
    network: float = 400.0
    """Bandwidth between nodes per device, in Gbit/s and direction."""
    decode_overhead: float = 5.0
    """Time that a decoding step of a server takes beside reading weights and cache, in milliseconds: scheduling,
    sampling, kernel starts."""

    round_overhead: float = 60.0
    """Time of a round beside generating, scoring and steps, in seconds: loading the models, export, refresh."""

    def __post_init__(self) -> None:
        for name in ("train_share", "prefill_share", "memory_share", "bandwidth_share", "link_share"):
            value = getattr(self, name)
            require(0 < value <= 1, f"assume.{name}", "in (0, 1]", value, "a share of the data sheet's number")
        require(self.network > 0, "assume.network", "> 0 Gbit/s", self.network, "400 is the default")
        for name in ("decode_overhead", "round_overhead"):
            value = getattr(self, name)
            require(value >= 0, f"assume.{name}", "at least 0", value, "0 counts none")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(NPDConfig):
    """What a run will need: memory per rank, hours, storage, nodes; from its recipe and the models' config.json."""

    nodes: int = 0
    """Nodes to plan for; 0: nnodes."""
    gpus_per_node: int = 0
    """Devices of a node; 0: nproc_per_node."""
    gpu: GpuName = "h100-80g"
    """Device, by the name of its data sheet (platform/accelerators.py)."""
    num_prompts: int = 0
    """Prompts of the run; 0: those of the file of prompts."""
    prompt_tokens: int = 0
    """Mean length of a prompt, in tokens; 0: 256, or what rollout.max_model_len leaves beside a response."""
    response_tokens: int = 0
    """Mean length of a response, in tokens; 0: half of rollout.max_tokens."""
    kept_share: float = 0.962
    """Share of the responses that selection keeps; the paper's proximal zone holds 96.2 %."""
    json: bool = False
    """Print the plan as JSON, for tools."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What is taken for granted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("nodes", "gpus_per_node", "num_prompts", "prompt_tokens", "response_tokens"):
            require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name), "give a positive number")
        require(0 < self.kept_share <= 1, "kept_share", "in (0, 1]", self.kept_share, "0.962 is the default")
        require(
            self.mean_response <= self.rollout.max_tokens,
            "response_tokens",
            f"at most rollout.max_tokens ({self.rollout.max_tokens})",
            self.mean_response,
            "raise rollout.max_tokens",
        )
        require(
            self.mean_prompt + self.mean_response <= self.rollout.max_model_len,
            "prompt_tokens + response_tokens",
            f"at most rollout.max_model_len ({self.rollout.max_model_len})",
            self.mean_prompt + self.mean_response,
            "raise rollout.max_model_len",
        )
        for stage in ("annotate", "train"):
            experts, name = getattr(self, stage).expert_model_parallel_size, f"{stage}.expert_model_parallel_size"
            require(experts == 1, name, "1", experts, "npd plan has all experts on a rank")

    @property
    def mean_prompt(self) -> int:
        """Mean length of a prompt, in tokens."""
        return self.prompt_tokens or max(min(_PROMPT_TOKENS, self.rollout.max_model_len - self.mean_response), 1)

    @property
    def mean_response(self) -> int:
        """Mean length of a response, in tokens."""
        return self.response_tokens or max(self.rollout.max_tokens // 2, 1)

    @property
    def num_nodes(self) -> int:
        """Nodes to plan for."""
        return self.nodes or self.nnodes

    @property
    def devices_per_node(self) -> int:
        """Devices of each."""
        return self.gpus_per_node or self.nproc_per_node
