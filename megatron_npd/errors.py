"""The errors that users see without a traceback."""

from __future__ import annotations

USER_ERROR = 2  # exit code of a command that it ended


class UserError(ValueError):
    """A mistake that the user can mend: bad input, configuration or environment.

    The message says ``what must be rule, got value; remedy`` and names file and record. ``run_main`` prints it
    without a traceback. Our own bugs are ``assert``s and other exceptions, and keep their traceback.
    """


class Damaged(UserError):
    """Sealed content that is not what its manifest says: no setting mends it, and no look at it later."""
