"""The page for those who come from the released code says what the code does."""

import re

from maskdino.checkpoint.released_config import CONVERTED, SAME_VALUE, get_value
from maskdino.config import load_config
from tests.conftest import REPOSITORY, load_module

tool = load_module(REPOSITORY / "tools" / "from_released.py")
PAGE = tool.PAGE.read_text()


def test_the_page_is_up_to_date() -> None:
    assert tool.updated(PAGE) == PAGE, "run tools/from_released.py"
    assert set(tool.EXAMPLES) == set(CONVERTED)


def test_our_keys_exist() -> None:
    cfg = load_config()
    converted = (CONVERTED[key](v) for key, values in tool.EXAMPLES.items() for v in values)
    for key in {*SAME_VALUE.values(), *(name for ours in converted for name in ours)}:
        get_value(cfg, key)
        assert f"`{key}" in PAGE


def test_an_outdated_table_is_seen() -> None:
    outdated = PAGE.replace("| `MODEL.MaskDINO.NHEADS` |", "| `MODEL.MaskDINO.HEADS` |")
    assert outdated != PAGE and tool.updated(outdated) == PAGE


def test_patterns_become_names() -> None:
    pattern = re.compile(r"a\.(?:b\.)?layers\.(\d+)\.(linear[12]\..*)")
    assert tool.readable(pattern) == "a.[b.]layers.N.linear[12].*"
    assert tool.filled(pattern, r"c.\1.d.\2") == "c.N.d.linear[12].*"
