"""Policy lag: how far the policy that generated the training data is behind the one being trained (METHOD section 4).

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lag_parts(learner_logprobs_T: Tensor, generator_logprobs_T: Tensor) -> dict[str, Tensor]:
    """Both estimators of KL(generator || learner), and for how many tokens they are defined.

    With r = log q_learner - log q_generator of the sampled token: k1 = -r is unbiased, k3 = exp(r) - 1 - r is never
    negative and has less variance. Both need samples drawn at temperature 1 from the full vocabulary; other tokens
    carry a NaN generator log-probability.

    Args:
        learner_logprobs_T: fp32, the model's log-probability of each label, from the training forward.
        generator_logprobs_T: fp32, the log-probability under which the label was sampled; NaN where undefined.

    Returns:
        ``lag_k1`` and ``lag_k3``, fp32 [T] in nats, NaN where undefined, and ``lag_tokens``, 1 where they are defined.
    """
    ratio_T = learner_logprobs_T - generator_logprobs_T
    return {
        "lag_k1": -ratio_T,
        "lag_k3": torch.expm1(ratio_T) - ratio_T,
        "lag_tokens": (~torch.isnan(ratio_T)).float(),
    }
