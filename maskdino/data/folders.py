"""Names of files in annotations stay within the folder that they are relative to."""

from __future__ import annotations

import os
from collections.abc import Iterator

from maskdino.data.annotation_checks import Finding
from maskdino.data.reading import DataError

HOW_TO_ALLOW = (
    "name files of the folder alone, or, if you trust where the annotations came from, register "
    "the dataset with any_path=True"
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


def inside(folder: str | os.PathLike, name: str, source: object, *, any_path: bool = False) -> str:
    """The path of a file that annotations, of this source, name in a folder; see `leaves`.

    Raises:
        DataError: the name leads out of the folder, and no other path is allowed.
    """
    folder = os.fspath(folder)
    if not any_path and leaves(folder, name):
        raise DataError(
            f"{source}: the file name {name[:200]!r} leads out of {folder}: {HOW_TO_ALLOW}"
        )
    return os.path.join(folder, name)


def check_names(images: list[dict], folder: str) -> Iterator[Finding]:
    """Checks that the files of images are in their folder; what is no name is left to others."""
    for index, image in enumerate(images):
        name = image.get("file_name")
        if isinstance(name, str) and leaves(folder, name):
            yield Finding(
                "file name leads out of the image folder",
                f"image {image.get('id')!r}: {name[:200]!a} is not in {folder}: {HOW_TO_ALLOW}",
                image=index,
            )
