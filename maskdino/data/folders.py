"""Names of files in annotations stay within the folder that they are relative to."""

from __future__ import annotations

import os
from collections.abc import Iterator

from maskdino.data.annotation_checks import Finding
from maskdino.data.reading import DataError

WITHIN = "name files of the folder alone"
HOW_TO_ALLOW = (  # of a dataset that is registered with a choice
    f"{WITHIN}, or, if you trust where the annotations came from, register the dataset with "
    "any_path=True"
)


def leaves(folder: str, name: str) -> bool:
    """Whether the name of a file leads out of a folder; links within the folder may do so.

    Without a folder, "", names are paths, and any will do.
    """
    if not folder or not (os.path.isabs(name) or ".." in name):
        return False
    root = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(folder, name))
    return not path.startswith(root.rstrip(os.sep) + os.sep)


def inside(
    folder: str | os.PathLike, name: str, source: object, *, any_path: bool | None = None
) -> str:
    """The path of a file that annotations, of this source, name in a folder; see `leaves`.

    `any_path` is what their dataset was registered with; None: there is no such choice.

    Raises:
        DataError: the name leads out of the folder, and no other path is allowed.
    """
    folder = os.fspath(folder)
    if not any_path and leaves(folder, name):
        advice = WITHIN if any_path is None else HOW_TO_ALLOW
        raise DataError(f"{source}: the file name {name[:200]!r} leads out of {folder}: {advice}")
    return os.path.join(folder, name)


def check_names(images: list[dict], folder: str, advice: str = HOW_TO_ALLOW) -> Iterator[Finding]:
    """Finds images whose file names lead out of the folder; what is no text is found elsewhere.

    The advice says what to do about them.
    """
    for index, image in enumerate(images):
        name = image.get("file_name")
        if isinstance(name, str) and leaves(folder, name):
            yield Finding(
                "file name leads out of the image folder",
                f"image {image.get('id')!r}: {name[:200]!a} is not in {folder}: {advice}",
                image=index,
            )
