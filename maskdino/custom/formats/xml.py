"""XML that keeps the line of each element, and takes no entities, whatever they stand for."""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element
from xml.parsers import expat

from maskdino.data import DataError


class Node(Element):
    """An element.

    Attributes:
        line: of the file, from 1.
    """

    line: int = 0

    def value(self, name: str) -> str | None:
        """Text of the first child of a name, without space around it; None: there is none."""
        text = self.findtext(name)
        return text.strip() if text and text.strip() else None


def read_xml(path: Path, most: int | None = None) -> Node:
    """Reads a file, or so much of it that the outermost element has `most` children.

    DataError if it is not well-formed, or declares entities or a document type.
    """
    parser = expat.ParserCreate()
    top: list[Node] = []
    stack: list[Node] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        node = Node(tag, attributes)
        node.line = parser.CurrentLineNumber
        (stack[-1].append if stack else top.append)(node)
        stack.append(node)

    def data(text: str) -> None:
        node = stack[-1]
        if not len(node):
            node.text = (node.text or "") + text

    def refuse(*_: object) -> None:
        # Entities can expand without end, or name files of this machine; labels need none.
        raise DataError(
            f"{path}, line {parser.CurrentLineNumber}: the file declares a document type or "
            "entities, which are not read: remove the declaration"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: stack.pop()
    parser.CharacterDataHandler = data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    parser.buffer_text = True
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 16):
                parser.Parse(block)
                if most is not None and top and len(top[0]) >= most:
                    return top[0]
            parser.Parse(b"", True)
    except expat.ExpatError as error:
        raise DataError(f"{path}, line {error.lineno}: no well-formed XML: {error}") from error
    except (OSError, ValueError, LookupError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as XML: {error}") from error
    return top[0]
