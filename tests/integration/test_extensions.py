"""Users' own modules and registries: `maskdino.integration.extensions`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from maskdino.config import load_config
from maskdino.integration import extensions
from maskdino.integration.extensions import ExtensionError, ExtensionRegistry, import_extension

OWN_KEYS = """
def add_config(cfg):
    cfg.MODEL.MINE = 3
"""


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets, after each test, what it imported."""
    monkeypatch.setenv(extensions.VARIABLE, "")
    monkeypatch.setattr(extensions, "_modules", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    extensions.add_import_option(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


def test_file_adds_keys_that_files_and_overrides_use(tmp_path: Path) -> None:
    (tmp_path / "my_keys.py").write_text(OWN_KEYS)
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("MODEL:\n  MINE: 4\n")
    with pytest.raises(KeyError, match=r"MODEL.MINE in .*mine.yaml.*--import"):
        load_config(str(yaml))
    args = parse("--import", str(tmp_path / "my_keys.py"), "SEED", "1")
    assert args.opts == ["SEED", "1"]
    assert load_config().MODEL.MINE == 3
    assert load_config(str(yaml)).MODEL.MINE == 4
    assert load_config(None, ["MODEL.MINE", "5"]).MODEL.MINE == 5


def test_written_configuration_tells_what_it_needs(tmp_path: Path) -> None:
    module = tmp_path / "my_header.py"
    module.write_text(OWN_KEYS)
    import_extension(module)
    written = tmp_path / "config.yaml"
    written.write_text(extensions.config_header() + load_config().dump())
    assert load_config(str(written)).MODEL.MINE == 3
    extensions._modules.clear()
    with pytest.raises(KeyError, match=f"MODEL.MINE.* made with --import {module}"):
        load_config(str(written))
    os.environ[extensions.VARIABLE] = ""
    assert extensions.config_header() == ""


def test_module_by_name_and_its_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "keys.py").write_text(OWN_KEYS)
    (tmp_path / "my_neighbor.py").write_text("VALUE = 7")
    (tmp_path / "my_file.py").write_text("from my_neighbor import VALUE")
    monkeypatch.chdir(tmp_path)
    parse("--import", "my_package.keys", "--import", "./my_file.py")
    assert load_config().MODEL.MINE == 3
    assert sys.modules["my_file"].VALUE == 7
    words = [str(tmp_path / "my_file.py"), "my_package.keys"]
    assert sorted(os.environ[extensions.VARIABLE].split(os.pathsep)) == words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nowhere.py", "error: --import .*nowhere.py: there is no such file"),
        ("no_such_package.module", "error: --import no_such_package.module: there is no such mod"),
        ("json.nothing", "error: --import json.nothing: there is no such module"),
    ],
)
def test_missing_modules_end_with_one_line(word: str, message: str) -> None:
    with pytest.raises(SystemExit, match=f"^{message}[^\n]*$"):
        parse("--import", word)


def test_failing_module_shows_its_own_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "my_fault.py"
    path.write_text("import json\n\nnumber = 1 / 0  # here\n")
    with pytest.raises(
        SystemExit, match=f"^error: --import {path} failed: ZeroDivisionError: .* zero$"
    ):
        parse("--import", str(path))
    assert f'"{path}", line 3' in capsys.readouterr().err
    # What a module of the user's misses is an error inside it.
    path.write_text("import not_installed_at_all\n")
    with pytest.raises(SystemExit, match="failed: ModuleNotFoundError: .*not_installed_at_all"):
        parse("--import", str(path))


def test_file_with_the_name_of_another_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").touch()
    with pytest.raises(ExtensionError, match="its name is that of .*rename the file"):
        import_extension(tmp_path / "json.py")


def test_started_processes_import_it_too(
    tmp_path: Path, repository: Path, warm_python: str
) -> None:
    """Spawned ones cannot unpickle what it defines otherwise."""
    (tmp_path / "my_functions.py").write_text(
        f"import os\n{OWN_KEYS}\n"
        "def work(number):\n"
        "    from maskdino.config import load_config\n"
        "    return number + load_config().MODEL.MINE, os.getpid()\n"
    )
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, os\n"
        "from maskdino.integration.extensions import import_extension\n"
        "if __name__ == '__main__':\n"
        f"    module = import_extension({str(tmp_path / 'my_functions.py')!r})\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        result, process = pool.apply(module.work, (4,))\n"
        "    assert process != os.getpid()\n"
        "    print('result', result)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [warm_python, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert "result 7" in done.stdout, done.stderr


def test_environment_names_modules_where_there_is_no_option(
    tmp_path: Path, repository: Path, warm_python: str
) -> None:
    (tmp_path / "my_keys.py").write_text(OWN_KEYS)
    code = "import maskdino.config; print(maskdino.config.load_config().MODEL.MINE)"
    environment = {**os.environ, "PYTHONPATH": str(repository), "MASKDINO_IMPORT": "my_keys"}
    done = subprocess.run(
        [warm_python, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "3", done.stderr


def test_registry_tells_what_it_holds() -> None:
    registry = ExtensionRegistry("THING", "MODEL.THING")

    @registry.register()
    def first() -> int:
        return 1

    registry.register(lambda: 2, name="second")
    assert registry.find("first")() == 1
    with pytest.raises(
        ValueError, match="MODEL.THING names 'third', .*registered: first, second.*--import"
    ):
        registry.check(["first", "third"])


def test_registry_takes_what_is_defined_again_but_nothing_else() -> None:
    registry = ExtensionRegistry("THING", "MODEL.THING")

    def define(number: int) -> None:
        @registry.register()
        def thing() -> int:
            return number

    define(1)
    define(2)  # as when a cell of a notebook runs once more
    assert registry.find("thing")() == 2
    with pytest.raises(AssertionError, match="'thing' was already registered"):
        registry.register(test_registry_tells_what_it_holds, name="thing")
