"""Source nodes in messages of the code that runs."""

from __future__ import annotations


def printable(node: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in node)
