"""Reads configurations: the defaults, a YAML file and single values.

Nothing in a file is executed.
"""

import difflib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg

from maskdino.config.defaults import RECOMPUTE_BEFORE, add_maskdino_config
from maskdino.integration.extensions import extend_config, read_header
from maskdino.integration.registration import tell_configuration

logger = logging.getLogger(__name__)

_CONVERT = (
    "`maskdino convert released --config FILE --output FOLDER` (tools/convert_released.py) "
    "converts configurations of the released Mask DINO code"
)
# Nodes of a file whose keys another library defines: arguments of a timm model, released Swin
# configurations.
_OPEN_NODES = ("MODEL.TIMM.ARGS.", "MODEL.SWIN.")
_LARGEST = 10**300  # of whole numbers that can be floats
_LONGEST = 250  # characters of both ends of what other packages say
_OWN_KEYS = " A module of your own that adds it, in add_config(cfg), is imported with --import."


def load_config(config_file: str | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """Reads a configuration: detectron2's and our defaults, a YAML file, then single values.

    Nothing in the file is executed. The data of a run, which are recorded beside its configuration
    (`maskdino.data.records`), are registered.

    Args:
        config_file: path of a YAML file, which may name a `_BASE_`; None: the defaults alone.
        overrides: keys and values in turn, as on a command line.

    Raises:
        FileNotFoundError: if there is no such file.
        KeyError: if a key does not exist; the message names it and those most like it.
        ValueError: if the file is no YAML, or one of the released Mask DINO code.
        ValueError: if an override lacks its value, or a value has the wrong type.
    """
    cfg = get_cfg()
    add_maskdino_config(cfg)
    extend_config(cfg)
    known, whole = flatten(cfg) | RECOMPUTE_BEFORE, cfg.clone()
    given = dict(zip(overrides[::2], overrides[1::2], strict=False))
    if config_file:
        loaded = read_file(config_file)
        given = flatten(loaded) | given
        names = [name for name in flatten(loaded) if not name.startswith(_OPEN_NODES)]
        _check_keys(names, known, f"in {config_file}", read_header(config_file) or _OWN_KEYS)
        try:
            _merge_file(cfg, config_file, loaded)
            _check_given(cfg, whole)
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{config_file}: {one_line(error)}") from error
    if len(overrides) % 2:
        raise ValueError(
            f"Overrides are KEY VALUE pairs, but these are {len(overrides)} words: "
            f"{list(overrides)}"
        )
    names = [name for name in overrides[::2] if not name.startswith(_OPEN_NODES)]
    _check_keys(names, known, "on the command line")
    _make_open_keys(cfg, overrides[::2])
    merge_overrides(cfg, overrides)
    _heed_old_keys(cfg, given)
    if config_file:
        tell_configuration(config_file)
    return cfg


def _heed_old_keys(cfg: CfgNode, given: Mapping[str, Any]) -> None:
    """Sets MODEL.MASK_DINO.RECOMPUTE where keys that it replaces are on, and it is not given."""
    for key, value in RECOMPUTE_BEFORE.items():
        if str(given.get(key)) == "True" and "MODEL.MASK_DINO.RECOMPUTE" not in given:
            logger.warning("%s is read as MODEL.MASK_DINO.RECOMPUTE %s", key, value)
            cfg.MODEL.MASK_DINO.RECOMPUTE = value
            return


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Sets single values, whose keys are known (in place); ValueError for a wrong type."""
    usual = cfg.clone()
    try:
        cfg.merge_from_list(_with_floats(cfg, overrides))
    except (AssertionError, ValueError, TypeError, KeyError, RecursionError) as error:
        words = " ".join(map(ascii, overrides))[:200]
        raise ValueError(f"{one_line(error)} (on the command line: {words})") from error
    _check_given(cfg, usual)


def one_line(error: Exception) -> str:
    """What an error says, whose values may have several lines."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(said).split())
    return text if len(text) < 2 * _LONGEST else f"{text[:_LONGEST]} ... {text[-_LONGEST:]}"


def _check_given(cfg: CfgNode, usual: CfgNode, prefix: str = "") -> None:
    """Raises where a key has no value, which YACS takes for one of any type."""
    for name, value in usual.items():
        if f"{prefix}{name}." in _OPEN_NODES:
            continue
        if isinstance(value, CfgNode):
            _check_given(cfg[name], value, f"{prefix}{name}.")
        elif value is not None and cfg[name] is None:
            raise ValueError(f"{prefix}{name} is None; it must be a value like {value!r}")


def _merge_file(cfg: CfgNode, config_file: str, loaded: dict[str, Any]) -> None:
    version = loaded.get("VERSION", cfg.VERSION)
    if not isinstance(version, int) or version > cfg.VERSION:
        raise ValueError(f"VERSION is {version!r}; it must be at most {cfg.VERSION}")
    if loaded.get("VERSION") != cfg.VERSION:  # detectron2 knows how to read older ones
        cfg.merge_from_file(config_file, allow_unsafe=False)
        return
    _make_floats(loaded, cfg)
    cfg.merge_from_other_cfg(CfgNode(loaded))


def _make_floats(values: dict[str, Any], like: CfgNode) -> None:
    """Turns integers into floats where `like` has floats (in place): 2 is a number like 2.0."""
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(like.get(name), dict):
            _make_floats(value, like[name])
        elif type(value) is int and abs(value) < _LARGEST and isinstance(like.get(name), float):
            values[name] = float(value)


def _with_floats(cfg: CfgNode, overrides: Sequence[str]) -> list[Any]:
    """The same for keys and values in turn."""
    result: list[Any] = list(overrides)
    for index in range(0, len(result), 2):
        node: Any = cfg
        for part in result[index].split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, float) and re.fullmatch(r"[+-]?\d+", str(result[index + 1])):
            result[index + 1] = float(result[index + 1])
    return result


def _make_open_keys(cfg: CfgNode, names: Sequence[str]) -> None:
    """Gives the keys of open nodes a place, as a list of values can only replace what is there."""
    for name in names:
        if name.startswith(_OPEN_NODES):
            *nodes, last = name.split(".")
            node = cfg
            for part in nodes:
                node = node[part]
            node.setdefault(last, None)


def read_file(config_file: str) -> dict[str, Any]:
    """The nested values of a YAML file, with those of its `_BASE_`."""
    _check_yaml(config_file)
    try:
        loaded = CfgNode.load_yaml_with_base(config_file, allow_unsafe=False)
    except AssertionError as error:
        raise ValueError(f"{config_file}: {one_line(error)}") from error
    nodes = loaded.get("MODEL")
    nodes = nodes if isinstance(nodes, dict) else {}
    if "MaskDINO" in nodes:
        raise ValueError(f"{config_file} has MODEL.MaskDINO: {_CONVERT}")
    if "MASK_FORMER" in nodes:
        raise ValueError(f"{config_file} is a configuration of Mask2Former or MaskFormer")
    return loaded


def read_yaml(path: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> dict[Any, Any]:
    """The keys and values of a file, which has some.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or none with keys; one line with file and, if known, line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = error.problem or error.context
        hint = f"; {_CONVERT}" if ":python/" in str(problem) else ""
        raise ValueError(f"{where}: {problem}{hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # the latter of texts, numbers and dates
        raise ValueError(f"{path} is no YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a single {type(content).__name__}"
        raise ValueError(f"{path} holds {kind}; a configuration holds keys and values (KEY: VALUE)")
    return content


def _check_yaml(path: str, within: tuple[str, ...] = ()) -> None:
    """Checks that a file, named as `_BASE_` by others, and every `_BASE_` of it, is YAML."""
    if path in within:
        raise ValueError(f"{path} is its own _BASE_: {' -> '.join([*within, path])}")
    named = f"{within[-1]} names it as _BASE_, but " if within else ""
    try:
        content = read_yaml(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{named}there is no configuration {path}") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{named}configuration {path} cannot be read: {reason}") from error
    bases = content.get("_BASE_", [])
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or base.startswith("http://"):
            hint = "the path of a file, or https://, which nobody can change on its way"
            raise ValueError(f"{path}: _BASE_ is {base!r}; it must be {hint}")
        if not base.startswith("https://"):
            found = os.path.join(os.path.dirname(path), os.path.expanduser(base))
            _check_yaml(os.path.normpath(found), (*within, path))


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one with dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _check_keys(
    names: Sequence[str],
    known: Mapping[str, Any],
    where: str,
    header: str = _OWN_KEYS,
) -> None:
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=3) or _keys_ending_alike(name, known)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else "."
            raise KeyError(f"Unknown configuration key {name} {where}{hint}{header}")


def _keys_ending_alike(name: str, known: Mapping[str, Any]) -> list[str]:
    last = name.rpartition(".")[2]
    alike = [key for key in known if key.rpartition(".")[2] == last]
    return sorted(alike, key=lambda key: "MASK_DINO" not in key)[:3]


def get_value(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def complete_config(cfg: CfgNode) -> CfgNode:
    """Fills in the keys that a configuration lacks, with their usual values.

    Programs that know nothing of Mask DINO (SAHI) read a file after `cfg.set_new_allowed(True)`:
    then it has the keys of the file alone.

    Returns:
        The configuration itself, if nothing is missing; it is never changed.
    """
    whole = get_cfg()
    add_maskdino_config(whole)
    if flatten(whole).keys() <= flatten(cfg).keys():
        return cfg
    whole.set_new_allowed(True)
    whole.merge_from_other_cfg(cfg)
    return whole
