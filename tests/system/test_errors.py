"""Of what others say, the line that says what is wrong."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from maskdino.system.errors import reason_of


class Runs:
    """Runs a program when it is loaded."""

    def __init__(self, function: object) -> None:
        self.function = function

    def __reduce__(self) -> tuple:
        return self.function, ("true",)


def test_the_first_line_or_the_type() -> None:
    assert reason_of(ValueError("\n what\nfor")) == "what"
    assert reason_of(ConnectionResetError()) == "ConnectionResetError"


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ("\n\t(2) Or do this.\n\tWeightsUnpickler error: ", "Unsupported global: GLOBAL a.b"),
        (" Please file an issue: WeightsUnpickler error: ", "Unsupported operand 194"),
        (" Please file an issue: WeightsUnpickler error: \n\n", "Unsupported operand 149"),
        ("\n\n\n", "Trying to load unsupported GLOBAL posix.system"),
    ],
)
def test_refusals_of_several_releases(before: str, reason: str) -> None:
    advice = "\n\nCheck the documentation of torch.load to learn more."
    text = (
        f"Weights only load failed. It will likely succeed.{before}{reason}. Please use c.{advice}"
    )
    assert reason_of(pickle.UnpicklingError(text)) == reason


@pytest.mark.parametrize("evil", [Runs(os.system), Runs(os.path.join), Runs])
def test_pytorchs_refusals_without_their_advice(evil: object, tmp_path: Path) -> None:
    """It advises to load files that could run code."""
    path = tmp_path / "evil.pth"
    for write in (torch.save, lambda *words: path.write_bytes(pickle.dumps(words[0]))):
        write({"model": evil}, path)
        with pytest.raises(pickle.UnpicklingError) as error:
            torch.load(path, weights_only=True)
        reason = reason_of(error.value)
        assert reason.startswith(("Trying to load unsupported", "Unsupported "))
        assert "weights_only" not in reason and "safe_globals" not in reason
