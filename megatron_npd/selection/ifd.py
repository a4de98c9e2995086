"""IFD and Delta-IFD from the losses that the annotator left (METHOD section 3; Li et al. 2024).

Legend: N samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LEAST_UNCONDITIONAL_LOSS = 1e-6  # nats per token; below it the ratio says nothing


def ifd(loss_N: npt.NDArray[np.float32], loss_unconditional_N: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How much the prompt helps to write the response: L(y|x) / L(y).

    Args:
        loss_N: L(y|x), mean nats per response token [N].
        loss_unconditional_N: L(y), the same without the prompt [N].

    Returns:
        IFD [N]; NaN where L(y) is below 1e-6 or a loss is not finite.
    """
    defined_N = (
        np.isfinite(loss_N) & np.isfinite(loss_unconditional_N) & (loss_unconditional_N >= LEAST_UNCONDITIONAL_LOSS)
    )
    ratio_N = np.full(len(loss_N), np.nan, np.float32)
    return np.divide(loss_N, loss_unconditional_N, out=ratio_N, where=defined_N)


def delta_ifd(
    ifd_teacher_N: npt.NDArray[np.float32], ifd_student_N: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """IFD of the teacher less that of the student who wrote the response [N]; NaN where one is undefined."""
    return ifd_teacher_N - ifd_student_N
