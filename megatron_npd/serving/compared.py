"""What servers are compared by: the log-probabilities that each gives for the same tokens, and what they must be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megatron_npd.errors import UserError
from megatron_npd.probe import PROBED, known_probe, probe_ids
from megatron_npd.serving.control import Control
from megatron_npd.serving.protocol import Malformed, is_defined, read_scores, scoring_body
from megatron_npd.serving.server import GENERATE, ServerLost

# Nats that the median token may differ by between kernels and tensor-parallel layouts. With SmolLM2-135M in 1, 2, 4
# and 8 parts and 16 prompts of random tokens it was at most 0.17 in bfloat16 (where single tokens differed by 5) and
# 0.00001 in float32; a layer of zeros made 0.3 to 1.4 of it, a head shifted by a token 1.0 to 3.9.
_TOLERANCES = {"torch.float32": 0.01}
_TOLERANCE = 0.5  # of other types, and of a server that does not say its type


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What weights give for ``probe_ids``, on a server or as their export computed it.

    Attributes:
        whose: The server and its policy, or the export, in words.
        weights: Hash of the weights.
        ids: The tokens.
        logprobs: Of all but the first: unlike those of generated ones, rounding cannot make them another text's.
        tolerance: What their median may differ by from another's, in nats.
        quantization: What the server rounds the weights by; empty: it does not.
        known: Whether it is what the weights must give, not what a server makes of them.
    """

    whose: str
    weights: str
    ids: list[int]
    logprobs: list[float]
    tolerance: float
    quantization: str = ""
    known: bool = False

    @classmethod
    def of(cls, servers: Control, url: str, served: dict[str, Any] | None = None) -> Answer:
        """Ask a server for it.

        Args:
            servers: The server's pool.
            url: The server.
            served: What it describes; None: ask it.

        Raises:
            UserError: A log-probability is undefined, or the server makes no sense.
        """
        served = servers.call_worker(url, "npd_describe") if served is None else served
        size, marks = served.get("vocab_size"), servers.tag(url)
        whose = f"{url} with the weights {marks}"
        try:
            if type(size) is not int or size < 1:
                raise Malformed(f"a vocabulary of {size!r}")
            ids = probe_ids(size)
            answer = servers.control(url, GENERATE, body=scoring_body(ids), timeout=servers.patience)
            logprobs = read_scores(ids, answer)
            if not all(map(is_defined, logprobs)):
                raise Malformed(f"NaN or infinity among {logprobs}")
        except ServerLost:
            raise
        except (Malformed, UserError) as error:  # vLLM answers 400 where one is NaN, which is no JSON
            what = f"{whose} must give the log-probabilities of {PROBED} given tokens, got {error}"
            raise UserError(f"{what}; load another policy, or restart the server") from error
        return cls(
            whose=whose,
            weights=marks.rpartition("-")[2],
            ids=ids,
            logprobs=logprobs,
            tolerance=_tolerance(served.get("dtype")),
            quantization=str(served.get("quantization") or ""),
        )

    def is_like(self, other: Answer) -> bool:
        """Whether both are of the same weights and tokens, rounded alike."""
        return (self.weights, self.ids, self.quantization) == (other.weights, other.ids, other.quantization)

    def compare(self, other: Answer) -> None:
        """Raise UserError unless the other's log-probabilities are the same but for rounding."""
        apart = median(abs(one - two) for one, two in zip(self.logprobs, other.logprobs, strict=True))
        if apart > (tolerance := max(self.tolerance, other.tolerance)):
            wrong = "the server" if other.known else "one of them"
            raise UserError(
                f"{self.whose} must give the log-probabilities of {other.whose}, got {apart:.2g} nats apart, over "
                f"{tolerance}, in the median of {len(self.logprobs)} tokens; {wrong} computes wrongly: restart it "
                "and refresh again"
            )


def known_answer(policy_dir: str | Path) -> Answer | None:
    """What a policy's weights must give, where its export computed it; errors as for ``known_probe``."""
    if (known := known_probe(policy_dir)) is None:
        return None
    weights, probe = known
    return Answer(
        whose=f"the export {policy_dir}",
        weights=weights,
        ids=probe["ids"],
        logprobs=probe["logprobs"],
        tolerance=_tolerance(probe["dtype"]),
        known=True,
    )


def _tolerance(dtype: Any) -> float:
    return _TOLERANCES.get(str(dtype), _TOLERANCE)
