"""Recipe: the ordered graph passes with their options, as TOML.

[[pass]]
name = "canonicalize"

[[pass]]
name = "fuse_epilogues"
depth = 64
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..passes.base import Pass
from ..passes.registry import PASSES
from .errors import UsageError
from .options import CompileOptions


@dataclass(frozen=True)
class Recipe:
    """Graph passes in the order they run, before the target lowers the result."""

    passes: tuple[Pass, ...]

    def to_dict(self) -> dict[str, Any]:
        """The form that a TOML recipe and the artifact's manifest share; options that are unset are left out, as TOML has no null."""
        return {"pass": [{"name": step.name, **{key: value for key, value in step.options().items() if value is not None}} for step in self.passes]}

    @staticmethod
    def default() -> Recipe:
        """Every lossless pass once, then canonical form again: layout and recognition leave foldable constants behind."""
        return Recipe((*(cls() for cls in PASSES.values() if not cls.lossy), PASSES["canonicalize"]()))

    @staticmethod
    def of(options: CompileOptions) -> Recipe:
        """The recipe that the options ask for: the file's or the default, with the passes that flags ask for put in, or in place of their namesakes."""
        recipe = Recipe.load(options.recipe) if options.recipe is not None else Recipe.default()
        flags = {cls.flag: cls for cls in PASSES.values() if cls.flag}
        for flag, value in options.compression.items():
            if value is None:
                continue
            if flag not in flags:
                raise UsageError(f"no pass takes '{flag}': expected one of {', '.join(sorted(flags)) or 'none'}")
            recipe = recipe.having(flags[flag].from_flag(value))
        return recipe

    def having(self, step: Pass) -> Recipe:
        """With `step` in place of the passes of its name, or before the first pass that the registry puts behind it."""
        if any(old.name == step.name for old in self.passes):
            return Recipe(tuple(step if old.name == step.name else old for old in self.passes))
        order = list(PASSES)
        later = order[order.index(step.name) + 1 :]
        place = next((index for index, old in enumerate(self.passes) if old.name in later), len(self.passes))
        return Recipe((*self.passes[:place], step, *self.passes[place:]))

    @staticmethod
    def load(path: Path) -> Recipe:
        """Read a TOML recipe; UsageError names the unknown pass or option and what would be right."""
        try:
            entries = tomllib.loads(path.read_text()).get("pass", [])
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"recipe {path} is not readable TOML: {error}") from error
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries):
            raise UsageError(f"recipe {path}: expected [[pass]] tables, each with a name")
        return Recipe(tuple(_step(entry, path) for entry in entries))


def _step(entry: dict[str, Any], path: Path) -> Pass:
    options = {key: value for key, value in entry.items() if key != "name"}
    cls = PASSES.get(entry["name"])
    if cls is None:
        raise UsageError(f"recipe {path}: unknown pass '{entry['name']}', expected one of {', '.join(PASSES)}")
    known = [field.name for field in fields(cls)]
    if wrong := sorted(set(options) - set(known)):
        raise UsageError(f"recipe {path}: pass '{cls.name}' has no option {', '.join(wrong)}; it has {', '.join(known) or 'none'}")
    return cls(**options)
