#!/usr/bin/env python3
"""Writes the tables of docs/from_released.md from the code's own.

python tools/from_released.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from maskdino.checkpoint.released_config import (
    CONVERTED,
    DEFAULTS,
    MAPPERS,
    MUST_BE,
    NO_MEANING,
    SAME_VALUE,
)
from maskdino.checkpoint.released_weights import INPUT_PROJECTION, RENAMES
from maskdino.integration.released_names import MODULES, NAMES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "from_released.md"
# Values of each converted key, which the page shows.
EXAMPLES: dict[str, tuple[object, ...]] = {
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": ("low2high", "high2low"),
    "MODEL.MaskDINO.DN": ("seg", "standard", "no"),
    "MODEL.MaskDINO.DN_NOISE_SCALE": (0.4,),
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": ("mask2box", "bitmask", "no"),
    "MODEL.MaskDINO.SEMANTIC_CE_LOSS": (True, False),
    "MODEL.MaskDINO.BOX_LOSS": (True, False),
    "MODEL.MaskDINO.TEST.TEST_FOUCUS_ON_BOX": (True, False),
    "INPUT.IMAGE_SIZE": (1024,),
    "INPUT.DATASET_MAPPER_NAME": tuple(MAPPERS),
}


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: object) -> str:
    """Text as code, where `|` does not end a cell."""
    return f"`{text}`".replace("|", "\\|")


def names_table() -> str:
    """Released names and modules, and what to use."""
    rows = [(code(k), code(new), how) for k, (new, how) in {**NAMES, **MODULES}.items()]
    return table(("released", "here", ""), rows)


def keys_table() -> str:
    """Released keys whose value is carried over, with what a file means that leaves them out."""
    rows = [
        (code(key), code(ours), code(DEFAULTS[key]) if key in DEFAULTS else "")
        for key, ours in SAME_VALUE.items()
    ]
    rows.append((code("MODEL.SWIN.*"), code("MODEL.SWIN.*"), ""))
    return table(("released key", "our key", "left out, it means"), rows)


def values_table() -> str:
    """Released keys whose value becomes another."""
    rows = []
    for key, convert in CONVERTED.items():
        for value in EXAMPLES[key]:
            ours = "<br>".join(code(f"{name} {new}") for name, new in convert(value).items())
            left_out = "; also where left out" if DEFAULTS.get(key) == value else ""
            rows.append((code(f"{key} {value}") + left_out, ours or "nothing to set"))
    return table(("released key and value", "ours"), rows)


def limits_table() -> str:
    """Released keys that must have one value, and those that nothing stands for."""
    rows = [(code(key), f"only {code(repr(value))}") for key, value in MUST_BE.items()]
    rows += [(code(key), f"left out: {why}") for key, why in NO_MEANING.items()]
    return table(("released key", "here"), rows)


def weights_table() -> str:
    """Released tensors, and what they are called here."""
    rows = [(code(readable(pattern)), code(filled(pattern, ours))) for pattern, ours in RENAMES]
    projection = filled(INPUT_PROJECTION, r"encoder.input_proj.\1.\2")
    rows.append(
        (code(readable(INPUT_PROJECTION)), f"{code(projection)}, N counted from the finest")
    )
    rows.append((code("backbone.*"), "the same for ResNets; Swin: as timm calls them"))
    return table(("released tensor", "ours"), rows)


def readable(pattern: re.Pattern[str] | str) -> str:
    """A pattern of names as people write it: N for a number, * for the rest."""
    text = pattern if isinstance(pattern, str) else pattern.pattern
    text = text.replace(r"(\d+)", "N").replace(r"\d+", "N").replace(r"\.", ".").replace(".*", "*")
    text = re.sub(r"\((?!\?)([^()]*)\)", r"\1", text)
    text = re.sub(r"\(\?:([^()|]*)\)\?", r"[\1]", text)
    return text.replace("(?:", "(").replace(".*", ".*").replace("\\", "")


def filled(pattern: re.Pattern[str], ours: str) -> str:
    """Our name with the groups of the pattern as `readable` writes them."""
    for number, group in enumerate(re.findall(r"\((?!\?)([^()]*)\)", pattern.pattern), 1):
        ours = ours.replace(f"\\{number}", readable(group))
    return ours


def updated(page: str) -> str:
    """The page with its tables made anew."""
    tables = {
        "names": names_table(),
        "keys": keys_table(),
        "values": values_table(),
        "limits": limits_table(),
        "weights": weights_table(),
    }
    for name, content in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(start)
        page = f"{before}{start}{content}\n{end}{rest.partition(end)[2]}"
    return page


def main() -> None:
    """Writes the page."""
    PAGE.write_text(updated(PAGE.read_text()))


if __name__ == "__main__":
    main()
