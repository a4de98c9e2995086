"""One rule for symbolic links: a run's directory may be reached through one, and nothing that its stages write is one.

A link half-way would be followed by some readers and not by others: what lies behind it is neither counted nor moved
with the run. So all say so before anything is paid for: the loop and the trainer at their start, each stage when it
begins to write, ``npd verify``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megatron_npd.errors import UserError
from megatron_npd.run_dir import PARTS


def links_of(run: str | Path) -> Iterator[Path]:
    """Every link among what stages write in a run, or in a part of one."""
    run = Path(run)
    parts = [part for part in (run / name for name in PARTS) if os.path.lexists(part)]
    for path in parts or (_entries(run) if run.is_dir() else []):
        yield from _links(path)


def refuse_links(run: str | Path) -> None:
    """Insist that what stages write in a run is no link and holds none.

    Raises:
        UserError: It is or does.
    """
    for link in links_of(run):
        raise UserError(link_in_words(link))


def refuse_links_beside(path: Path) -> None:
    """``refuse_links`` as far as a few names tell: the parts of the run that ``path`` lies in, and the way to it.

    Raises:
        UserError: One of them is a link.
    """
    names = path.absolute().parts
    place = next((place for place in range(len(names) - 1, 0, -1) if names[place] in PARTS), None)
    if place is None:
        return
    run = Path(*names[:place])
    for looked_at in [
        *(run / part for part in PARTS),
        *(Path(*names[:end]) for end in range(place + 1, len(names) + 1)),
    ]:
        if looked_at.is_symlink():
            raise UserError(link_in_words(looked_at))


def link_in_words(link: Path) -> str:
    """What is wrong with a link, and what to do."""
    return (
        f"{link} must lie in the run, got a link to {os.readlink(link)}; put the whole run there (its directory "
        "itself may be a link), or mount the other disk in the link's place"
    )


def _links(path: Path) -> Iterator[Path]:
    if path.is_symlink():
        yield path
    elif path.is_dir():
        for entry in _entries(path):
            yield from _links(entry)


def _entries(directory: Path) -> list[Path]:
    """What lies in a directory, but for hidden files and wandb's own, which hold links and which no stage reads."""
    return sorted(entry for entry in directory.iterdir() if not entry.name.startswith(".") and entry.name != "wandb")
