"""Policy lag: how far the policy that generated the training data is behind the one being trained (METHOD section 4).

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lag_sums(learner_logprobs_T: Tensor, generator_logprobs_T: Tensor, mask_T: Tensor) -> Tensor:
    """Sums of both estimators of KL(generator || learner) over the tokens for which it is defined.

    With r = log q_learner - log q_generator of the sampled token: k1 = -r is unbiased, k3 = exp(r) - 1 - r is never
    negative and has less variance. Both need samples drawn at temperature 1 from the full vocabulary; other tokens
    carry a NaN generator log-probability and are left out.

    Args:
        learner_logprobs_T: fp32, the model's log-probability of each label, from the training forward.
        generator_logprobs_T: fp32, the log-probability under which the label was sampled; NaN where undefined.
        mask_T: fp32, 1 on response tokens.

    Returns:
        fp32 [3]: sum of k1, sum of k3, number of tokens in them.
    """
    defined_T = (mask_T > 0) & ~torch.isnan(generator_logprobs_T)
    ratio_T = torch.where(defined_T, learner_logprobs_T - generator_logprobs_T, 0.0)
    return torch.stack([-ratio_T.sum(), (torch.expm1(ratio_T) - ratio_T).sum(), defined_T.sum().float()])
