"""Training on megatron-core: packed rows in, checkpoints and metrics out."""

import warnings

from megatron_npd.platform import get_platform

get_platform()  # before any submodule imports megatron.core

# Remarks of torch on how megatron-core calls it; nothing that a user could mend.
warnings.filterwarnings(
    "ignore", message=r".*The \.grad attribute of a Tensor that is not a leaf", category=UserWarning
)
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
