"""What ``tests/dist.py``'s fork server imports once: the slow parts, on the CPU whatever the machine has."""

import pytest  # noqa: F401

from megatron_npd.platform import get_platform

get_platform("cpu")

from tests import helpers  # noqa: E402, F401  (transformers)
