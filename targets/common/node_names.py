"""Source nodes in messages of the code that runs."""

from __future__ import annotations

from collections.abc import Mapping


def printable(node: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in node)


def node_of(name: str, origins: Mapping[str, str]) -> str:
    """The node behind a variable; passes put numbers behind the name of the one that they replace."""
    short = name
    while short not in origins and short[-1:].isdigit():
        short = short[:-1]
    return origins.get(short, name)
