"""The one exception that a user's input can raise."""

from __future__ import annotations


class UserError(Exception):
    """A problem the user can mend; its message is one sentence naming field, value and remedy.

    The command line prints it without a traceback and exits with code 2.
    """
