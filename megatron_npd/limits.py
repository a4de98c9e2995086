"""The operating system's limit on open files, raised where a process is about to need more of them."""

from __future__ import annotations

import os
import resource

from megatron_npd.log import UserError


def allow_connections(count: int) -> None:
    """Make room for ``count`` connections beside the files that are open: the usual soft limit is 1024.

    Raises:
        UserError: The hard limit is too low for them.
    """
    wanted = count + len(os.listdir("/proc/self/fd")) + 64  # libraries and logs open a few more
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard < wanted and hard != resource.RLIM_INFINITY:
        raise UserError(
            f"the limit of open files must be at least {wanted} for {count} requests in flight, got {hard} (ulimit "
            "-Hn); lower concurrency, or have the limit raised (limits.conf, or LimitNOFILE of Slurm's daemon)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
