"""Errors that a user can mend: commands end with their text, without a traceback."""

from __future__ import annotations

import struct
import zipfile
import zlib

# What reading a file of any other content may raise, besides an `OSError`.
BROKEN = (
    EOFError,
    RuntimeError,
    LookupError,
    ValueError,
    AttributeError,
    TypeError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class UserError(ValueError):
    """A file, a value or a request is at fault: the message names it, and says what to do."""


class WriteError(OSError, UserError):
    """A file cannot be written, as on a full disk: the message names it, and says what to do."""


class NotFiniteError(FloatingPointError, UserError):
    """Numbers became infinite or NaN: the message names where, and says what to do."""


def reason_of(error: BaseException) -> str:
    """The line of an error's text that says what is wrong; its type where there is no text.

    That is the first one. Where PyTorch refuses to load a file, it is the last one before the
    advice; what comes first is how to load it all the same.
    """
    text, _, advice = str(error).strip().partition("\n\nCheck the documentation of torch.load")
    lines = text.strip().splitlines() or [type(error).__name__]
    line = lines[-1 if advice else 0].rpartition("WeightsUnpickler error: ")[2]
    return line.strip().partition(". Please use")[0]
