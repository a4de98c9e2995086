"""Model families, the megatron-core model, conversion from and to Hugging Face, and checkpoints."""

from megatron_npd.platform import get_platform

get_platform()  # its changes to torch come before any submodule's import of megatron.core
