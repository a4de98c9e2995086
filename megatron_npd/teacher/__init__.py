"""Teacher annotation: packed prefill on megatron-core."""

from megatron_npd.platform import get_platform

get_platform()  # before megatron.core is imported
