"""Reads small XML files without document types and entities, which could fill the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from batchgen.importing.rows import Refused

_DEPTH, _MOST = 32, 200_000


@dataclass
class Element:
    """An element: its name, its own text, and the elements in it."""

    name: str
    own: list[str] = field(default_factory=list)
    inner: list[Element] = field(default_factory=list)

    def all(self, name: str) -> Iterator[Element]:
        """The elements of this name directly in it."""
        return (one for one in self.inner if one.name == name)

    def first(self, name: str) -> Element | None:
        return next(self.all(name), None)

    def text(self, name: str) -> str | None:
        """The text of the first element of this name; None if there is none."""
        found = self.first(name)
        return None if found is None else "".join(found.own).strip()


def read_xml(data: bytes, where: str) -> Element:
    """Parse an XML file into its root.

    Raises:
        Refused: ``bad-xml``: it is damaged, or has a document type, entities, or too many elements.
    """
    root = Element("")
    path, count = [root], 0

    def start(name: str, _: object) -> None:
        nonlocal count
        count += 1
        if len(path) > _DEPTH or count > _MOST:
            raise ValueError(f"more than {_DEPTH} levels, or {_MOST:,} elements")
        one = Element(name)
        path[-1].inner.append(one)
        path.append(one)

    def refuse_type(*_: object) -> None:
        raise ValueError("a document type")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: path.pop() and None
    parser.CharacterDataHandler = lambda text: path[-1].own.append(text)
    parser.StartDoctypeDeclHandler = refuse_type
    parser.EntityDeclHandler = refuse_type
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        message = f"{where}: {error}; allowed: XML without document types and entities"
        raise Refused("bad-xml", message) from error
    return root.inner[0]
