"""The fixtures, a module a family; found by looking."""

import importlib
import pkgutil

from cases.base import Case

__all__ = ["CASES", "Case"]

CASES: tuple[Case, ...] = tuple(
    case
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")
    for case in importlib.import_module(f"{__name__}.{module}").CASES
)
