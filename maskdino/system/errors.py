"""Errors that a user can mend: commands end with their text, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A file, a value or a request is at fault: the message names it, and says what to do."""


class WriteError(OSError, UserError):
    """A file cannot be written, as on a full disk: the message names it, and says what to do."""
