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
from detectron2.config.compat import guess_version

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
_SECURE = "https://"  # how addresses begin that nobody can change on their way
_LARGEST = 10**300  # of whole numbers that can be floats
_LONGEST = 250  # characters of both ends of what other packages say
_OWN_KEYS = " A module of your own that adds it, in add_config(cfg), is imported with --import."


def load_config(
    config_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()
) -> CfgNode:
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
    config_file = os.fspath(config_file or "")
    if config_file:
        loaded = read_file(config_file)
        given = flatten(loaded) | given
        names = [name for name in flatten(loaded) if not name.startswith(_OPEN_NODES)]
        _check_keys(names, known, f"in {config_file}", read_header(config_file) or _OWN_KEYS)
        for name in RECOMPUTE_BEFORE:
            parent, _, last = name.rpartition(".")
            get_value(loaded, parent, {}).pop(last, None)
        try:
            _merge_file(cfg, config_file, loaded)
            _check_given(cfg, whole)
        except (AssertionError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{config_file}: {one_line(error)}") from error
    options = [word for word in overrides if str(word).startswith("--")]
    if options:
        raise ValueError(f"{options[0]} stands behind keys and values: options come before them")
    if len(overrides) % 2:
        raise ValueError(
            f"Overrides are KEY VALUE pairs, and a word is missing or left over: {list(overrides)}"
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
    """Sets MODEL.MASK_DINO.RECOMPUTE where keys that it replaces are on, and it is not given.

    These keys are not merged: yacs would say that they are ignored.
    """
    for key, value in RECOMPUTE_BEFORE.items():
        if str(given.get(key)) == "True" and "MODEL.MASK_DINO.RECOMPUTE" not in given:
            logger.warning("%s is read as MODEL.MASK_DINO.RECOMPUTE %s", key, value)
            cfg.MODEL.MASK_DINO.RECOMPUTE = value
            return


def merge_overrides(cfg: CfgNode, overrides: Sequence[str]) -> None:
    """Sets single values, whose keys are known (in place); ValueError for a wrong type."""
    usual = cfg.clone()
    try:
        cfg.merge_from_list(_words_to_merge(cfg, overrides))
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
    version = loaded["VERSION"] if "VERSION" in loaded else guess_version(loaded, config_file)
    if not isinstance(version, int) or version > cfg.VERSION:
        raise ValueError(f"VERSION is {version!r}; it must be at most {cfg.VERSION}")
    if version < cfg.VERSION:  # detectron2 knows how to read older ones
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


def _words_to_merge(cfg: CfgNode, overrides: Sequence[str]) -> list[Any]:
    """Keys and values in turn, with the same floats, and without keys of `_heed_old_keys`."""
    result: list[Any] = []
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if key not in RECOMPUTE_BEFORE:
            is_float = isinstance(get_value(cfg, key), float)
            whole = is_float and re.fullmatch(r"[+-]?\d+", str(value))
            result += key, float(value) if whole else value
    return result


def _make_open_keys(cfg: CfgNode, names: Sequence[str]) -> None:
    """Gives the keys of open nodes a place, as a list of values can only replace what is there."""
    for name in names:
        if name.startswith(_OPEN_NODES):
            parent, _, last = name.rpartition(".")
            node = get_value(cfg, parent)
            if isinstance(node, CfgNode):  # else merging the value says what is wrong
                node.setdefault(last, None)


def read_file(config_file: str) -> dict[str, Any]:
    """The nested values of a YAML file, with those of its `_BASE_`; errors as of `read_nested`."""
    try:
        loaded = read_nested(config_file)
    except ValueError as error:
        if ":python/" in str(error):
            raise ValueError(f"{error}; {_CONVERT}") from error
        raise
    nodes = loaded.get("MODEL")
    nodes = nodes if isinstance(nodes, dict) else {}
    if "MaskDINO" in nodes:
        raise ValueError(f"{config_file} has MODEL.MaskDINO: {_CONVERT}")
    if "MASK_FORMER" in nodes:
        raise ValueError(f"{config_file} is a configuration of Mask2Former or MaskFormer")
    return loaded


def read_yaml(path: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> dict[Any, Any]:
    """The keys and values of a file, or of what an address gives, which has some.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no YAML, or none with keys; one line with file and, if known, line.
    """
    try:
        is_address = path.startswith(_SECURE)
        with CfgNode._open_cfg(path) if is_address else open(path, encoding="utf-8") as file:
            content = yaml.load(file, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        problem = error.problem or error.context
        raise ValueError(f"{where}: cannot be read as YAML: {problem}") from error
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of texts, numbers and dates
        raise ValueError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        kind = "nothing" if content is None else f"a single {type(content).__name__}"
        raise ValueError(f"{path} holds {kind}, but must hold keys and values (KEY: VALUE)")
    return content


def read_nested(
    path: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader, within: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The nested values of a YAML file, over those of its `_BASE_`, or of several, in their order.

    Args:
        path: of the file.
        loader: what YAML's tags mean.
        within: files that name this one as `_BASE_`, the outermost first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read, is no YAML, or names a `_BASE_` that cannot be one.
    """
    if os.path.realpath(path) in map(os.path.realpath, within):
        raise ValueError(f"{path} is its own _BASE_: {' -> '.join([*within, path])}")
    named = f"{within[-1]} names it as _BASE_, but " if within else ""
    try:
        values = read_yaml(path, loader)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{named}there is no configuration {path}") from error
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{named}configuration {path} cannot be read: {reason}") from error
    bases = values.pop("_BASE_", [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or base.startswith("http://"):
            hint = "the path of a file, or https://, which nobody can change on its way"
            raise ValueError(f"{path}: _BASE_ is {base!r}; it must be {hint}")
        if not base.startswith(_SECURE):
            base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        found = base if base.startswith(_SECURE) else os.path.normpath(base)
        _merge(read_nested(found, loader, (*within, path)), merged, path)
    _merge(values, merged, path)
    return merged


def _merge(values: Mapping[str, Any], into: dict[str, Any], path: str) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ValueError(f"{path}: {key} has keys, but is {into[key]!r} in its _BASE_")
            _merge(value, into[key], path)
        else:
            into[key] = value


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


def get_value(node: Any, key: str, default: Any = None) -> Any:
    """The value of a dotted key in nested mappings; the default where there is no such key."""
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


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
