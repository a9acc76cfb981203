"""Runs maskdino/cli/install_detectron2.py by its path: importing the package needs detectron2."""

import runpy
from pathlib import Path

RECIPE = Path(__file__).resolve().parent.parent / "maskdino" / "cli" / "install_detectron2.py"

if __name__ == "__main__":
    runpy.run_path(str(RECIPE), run_name="__main__")
