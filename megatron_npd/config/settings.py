"""The settings of every stage but training, as frozen dataclasses; ``config/command_line.py`` makes flags of them.

Names are Megatron's where Megatron has the thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_npd.choices import FilterName
from megatron_npd.errors import UserError


def require(holds: bool, name: str, rule: str, got: object, remedy: str) -> None:
    if not holds:
        raise UserError(f"{name} must be {rule}, got {got}; {remedy}")


def require_share(name: str, value: float) -> None:
    require(0 <= value <= 1, name, "in [0, 1]", value, "0.1 is the default, 1 sets no limit")


def require_positive(config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) > 0, name, "at least 1", getattr(config, name), "give a positive number")


def require_not_negative(config: object, *names: str) -> None:
    for name in names:
        require(getattr(config, name) >= 0, name, "at least 0", getattr(config, name), "0 switches it off")


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How a model lies on its ranks, for the stages that run one on megatron-core."""

    micro_batch_size: int = 1
    """Rows of one forward pass per data-parallel rank."""
    tensor_model_parallel_size: int = 1
    """Ranks that share a layer."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the depth; training runs the 1F1B schedule."""
    context_parallel_size: int = 1
    """Ranks that share a row, a part of each segment each: for rows too long for one; 2 x as many must divide
    pack.segment_align where they train."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer, for models with experts; they are taken from the data-parallel ones."""
    decoder_first_pipeline_num_layers: int = 0
    """Layers of the first pipeline stage, which has the embedding too; 0: as many as the stages between."""
    decoder_last_pipeline_num_layers: int = 0
    """Layers of the last pipeline stage, which has the output layer too; 0: as many as the stages between."""
    bf16: bool = False
    """Compute in bfloat16 rather than float32; the optimizer's main weights are float32 either way."""

    def __post_init__(self) -> None:
        require_positive(self, "micro_batch_size", *self.parallel_sizes)
        require_not_negative(self, "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")

    @property
    def parallel_sizes(self) -> dict[str, int]:
        """The sizes that ``platform.initialize.initialize_distributed`` takes."""
        axes = ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "expert_model_parallel")
        return {f"{axis}_size": getattr(self, f"{axis}_size") for axis in axes}

    @property
    def pipeline_split(self) -> dict[str, int]:
        """How ``models.layout.check_layout`` is told of stages that are not alike, or cut once more."""
        return {"first": self.decoder_first_pipeline_num_layers, "last": self.decoder_last_pipeline_num_layers}

    @property
    def transformer_options(self) -> dict[str, Any]:
        """Fields of megatron-core's TransformerConfig that change where and when is computed, never what."""
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        fields = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        return {name: number for name, number in fields.items() if number}

    @property
    def copy_size(self) -> int:
        """Ranks that hold one copy of the model, but for experts, which several copies may share."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How the student's responses are generated."""

    urls: tuple[str, ...] = ()
    """Base URLs of running vLLM servers; empty: servers are launched on this machine."""
    token_file: str = ""
    """File with the servers' token, as npd serve keeps it; its owner alone may read it."""
    num_servers: int = 1
    """Number of servers to launch where no URLs are given."""
    greedy_paths: int = 1
    """Greedy responses per prompt (0 or 1)."""
    sampled_paths: int = 1
    """Sampled responses per prompt; the policy-lag meter needs at least one, at temperature 1 and top_p 1."""
    prompts_per_round: int = 0
    """Most prompts that a round asks: rounds take turns with the prompts; 0: each round asks all of them."""
    dataset_fraction: float = 0.0
    """Share of a round's responses that are the prompts' own (response) in place of the student's, as GKD mixes them;
    the servers give their log-probabilities."""
    temperature: float = 1.0
    """Sampling temperature of the sampled paths."""
    top_p: float = 1.0
    """Nucleus probability of the sampled paths."""
    max_tokens: int = 256
    """Longest response, in tokens."""
    max_model_len: int = 1024
    """Context of the server, prompt + response, in tokens."""
    concurrency: int = 128
    """Most requests in flight per server; fewer while some wait in its queue."""
    shard_size: int = 4096
    """Samples per sealed shard, in whole prompts."""
    merge_identical: bool = True
    """Keep one of the identical responses to a prompt, with their number; it weighs as much as all of them."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Computing type of the servers; auto: the checkpoint's."""
    request_timeout: float = 600.0
    """Time after which an unanswered request counts as failed, in seconds."""
    start_timeout: float = 600.0
    """Time a launched server may take to answer, in seconds."""
    server_patience: float = 300.0
    """Time for which lost servers that were given by URL are looked for once no other is left, in seconds."""
    server_args: tuple[str, ...] = ()
    """Further arguments of the launched vLLM servers, as vLLM spells them."""
    seed: int = 1234
    """Seed of the run, from which each response's seed is derived."""
    max_quarantined: float = 0.1
    """Share of the prompts, or of the responses, that may be quarantined before the stage stops."""

    def __post_init__(self) -> None:
        require(self.greedy_paths in (0, 1), "greedy_paths", "0 or 1", self.greedy_paths, "greedy responses are equal")
        require(
            self.greedy_paths + self.sampled_paths > 0,
            "greedy_paths + sampled_paths",
            "at least 1",
            0,
            "ask for a path",
        )
        require(self.temperature > 0, "temperature", "> 0", self.temperature, "use greedy_paths for greedy responses")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]", self.top_p, "1 keeps the whole distribution")
        require_positive(self, "num_servers", "max_tokens", "max_model_len", "concurrency", "shard_size")
        require_not_negative(self, "prompts_per_round")
        share = self.dataset_fraction
        require(0 <= share <= 1, "dataset_fraction", "in [0, 1]", share, "0 has the student answer all")
        require_share("max_quarantined", self.max_quarantined)
        for name in ("request_timeout", "start_timeout"):
            require(getattr(self, name) > 0, name, "> 0 seconds", getattr(self, name), "600 is the default")
        require(self.server_patience >= 0, "server_patience", "at least 0", self.server_patience, "0 does not wait")
        own = {"model", "port", "served-model-name", "worker-extension-cls", "logprobs-mode", "load-format"}
        own |= {"max-model-len", "max-num-seqs", "dtype", "seed"}
        for argument in self.server_args:
            name = argument.partition("=")[0].lstrip("-").replace("_", "-")
            remedy = "max_model_len, concurrency, dtype and seed have fields, the others are fixed"
            require(argument[:2] != "--" or name not in own, "server_args", f"without --{name}", argument, remedy)

    @property
    def measures_lag(self) -> bool:
        """Whether there are responses of which the policy lag is known (METHOD section 4)."""
        return self.sampled_paths > 0 and self.temperature == self.top_p == 1 and self.dataset_fraction < 1


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig(LayoutConfig):
    """How the teacher scores responses: one packed prefill on megatron-core."""

    top_k: int = 10
    """Teacher logits kept per response token."""
    seq_length: int = 2048
    """Tokens of a packed prefill row."""
    unconditional: bool = True
    """Score responses without their prompts too, by both models: two more passes, for the IFD that all filters but none
    select by."""
    max_quarantined: float = 0.1
    """Share of the samples that may be quarantined before the stage stops."""
    follow_seconds: float = 0.0
    """Annotate a round that is still being generated, shard by shard as they are sealed, and wait for the next one as
    long as responses arrive within this time, in seconds; 0: the round must be sealed."""
    backend: Literal["megatron", "vllm", "none"] = "megatron"
    """What runs the teacher: megatron-core; vLLM servers (prompt_logprobs) for teachers that no family covers; none: a
    run's responses train unscored (SFT, SeqKD)."""
    urls: tuple[str, ...] = ()
    """Base URLs of running vLLM servers of the teacher, for backend vllm; empty: one is launched on this machine."""
    token_file: str = ""
    """File with the servers' token, as npd serve keeps it; its owner alone may read it."""
    concurrency: int = 32
    """Requests in flight per server of the teacher."""
    keep_loaded: bool = True
    """Keep the teacher, and the student beside it, in memory from one round to the next; false: one model at a time,
    loaded anew for each, where not both fit beside the trainer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share("max_quarantined", self.max_quarantined)
        require(self.follow_seconds >= 0, "follow_seconds", "at least 0", self.follow_seconds, "0 does not follow")
        require(not self.urls or self.backend != "megatron", "urls", "empty", list(self.urls), "use backend vllm")
        none_follows = self.backend == "none" and self.follow_seconds > 0
        require(not none_follows, "follow_seconds", "0 with backend none", self.follow_seconds, "nobody follows")
        require_positive(self, "top_k", "seq_length", "concurrency")
        shared = 2 * self.context_parallel_size if self.context_parallel_size > 1 else 1
        rule = f"a multiple of 2 x context_parallel_size ({shared})"
        require(self.seq_length % shared == 0, "seq_length", rule, self.seq_length, "round it up")
        experts, rule = self.expert_model_parallel_size, "a divisor or a multiple of context_parallel_size"
        fits = 0 in (experts % self.context_parallel_size, self.context_parallel_size % experts)
        require(fits, "expert_model_parallel_size", rule, experts, "ranks that share experts score the same shards")


@dataclass(frozen=True, kw_only=True)
class AnnotateOrder:
    """A round to annotate, as an annotator that lives through a run is told of it (``teacher/orders.py``)."""

    rollouts: str
    """Directory of its rollouts."""
    out: str
    """Directory to seal."""
    student: str
    """Hugging Face directory of the policy that generated them."""
    max_quarantined: float
    """Share of the samples that may be quarantined."""
    may_keep_nothing: bool = False
    """Where no sample can be scored, leave the directory unsealed without an error."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which responses train (METHOD section 3)."""

    filter: FilterName = "delta_ifd"
    """delta_ifd: keep lower <= Delta-IFD <= tau, _lower and _upper: one bound alone; student_ifd, teacher_ifd: the same
    bounds on one model's IFD; perplexity: keep all with a defined IFD, weighted by 1 / the teacher's perplexity; none:
    keep all."""
    lower: float = 0.0
    """Lower bound of the proximal zone."""
    tau: float | None = None
    """Upper bound of the proximal zone; null: the tau_quantile of the first round, frozen from then on."""
    tau_quantile: float = 0.988
    """Quantile of the first round's measure that becomes tau."""
    domain_column: str = ""
    """Column of the prompts whose values have a tau of their own, by the same quantile; empty: one tau."""
    cut_by_length: Literal["keep", "drop"] = "keep"
    """What becomes of responses that were cut at max_tokens; they are counted either way."""
    prompt_weights: bool = False
    """Share the weight of one response among all kept ones of a prompt, so that prompts with more of them do not count
    more; the mean over all response tokens stays 1."""

    def __post_init__(self) -> None:
        require(0 < self.tau_quantile <= 1, "tau_quantile", "in (0, 1]", self.tau_quantile, "0.988 is the default")
        if self.tau is not None:
            require(self.tau >= self.lower, "tau", f">= lower ({self.lower})", self.tau, "swap the bounds")
            require(not self.domain_column, "tau", "null with domain_column", self.tau, "give tau_quantile")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How kept responses become training rows."""

    seq_length: int = 2048
    """Tokens of a training row."""
    segment_align: int = 1
    """Segments start at multiples of this many tokens; 2 x context-parallel size must divide it."""
    too_long: Literal["drop", "truncate"] = "drop"
    """What becomes of samples longer than a row: dropped, or cut at its end where the response has begun by then."""

    def __post_init__(self) -> None:
        require(self.segment_align > 0, "segment_align", "at least 1", self.segment_align, "1 is the default")
        require(
            self.seq_length > 0 and self.seq_length % self.segment_align == 0,
            "seq_length",
            f"a positive multiple of segment_align ({self.segment_align})",
            self.seq_length,
            "round it up",
        )
