"""The tests, in folders like the package's; without a GPU, Triton's kernels run under its interpreter here."""

import os

import torch

if not torch.cuda.is_available():
    # Triton wants the variable when it is first imported, hence here. Servers that tests start must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    from triton import knobs

    knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
