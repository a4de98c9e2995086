"""Near-Policy Distillation of large language models on megatron-core and vLLM (arXiv 2605.05940)."""

__version__ = "0.2.0.dev0"
