"""What ``tests/dist.py``'s fork server imports once: torch and megatron-core, on the CPU whatever the machine has."""

from megatron_npd.platform import get_platform

get_platform("cpu")
