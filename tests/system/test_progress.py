"""Bars that show how far a loop is never end it."""

import io
import sys
import threading

import pytest

from maskdino.system.progress import Bar


class Gone(io.StringIO):
    """A pipe whose reader leaves after some writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self.left = writes

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("writes", [0, 1, 2, 3, 100])
def test_work_goes_on_where_nobody_reads(writes: int) -> None:
    done: list[int] = []

    def work() -> None:
        with Bar(total=5, file=Gone(writes), mininterval=0) as bar:
            for number in range(5):
                done.append(number)
                bar.update()

    for _ in range(2):  # the second one needs the lock that all bars share
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert done == [*range(5), *range(5)]


def test_a_process_without_standard_error_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(Bar(range(3))) == [0, 1, 2]
