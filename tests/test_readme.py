"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_loss_alone_runs_as_the_readme_says() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert torch.isfinite(names["loss"].loss_T).all() and names["head"].weight.grad.abs().sum() > 0
