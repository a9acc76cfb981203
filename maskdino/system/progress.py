"""Bars that show how far a loop is."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar that cannot end the work that it shows.

    Where nobody reads standard error any more (`2>&1 | head`), or its disk is full, nothing is
    shown. tqdm raises, and keeps a lock that other threads then wait for.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """As tqdm's; shows nothing in a process without standard error."""
        super().__init__(*args, **{"disable": sys.stderr is None, **options})

    def display(self, *args: Any, **options: Any) -> bool | None:
        """Shows the bar as it is now."""
        with suppress(OSError):
            return super().display(*args, **options)
        return None

    def close(self) -> None:
        """Ends the bar."""
        with suppress(OSError):
            super().close()
