"""Which modules have to be loaded anew because they have taken something from another one."""

import ast
import sys
from collections.abc import Mapping
from pathlib import Path


def forget(module: str, dependents: set[str]) -> None:
    """Let `module`, and all that took something from it, be loaded anew."""
    for name in {module, *dependents} & set(sys.modules):
        del sys.modules[name]
        package, _, attribute = name.rpartition(".")
        if package in sys.modules and hasattr(sys.modules[package], attribute):
            # `from package import module` would find the old one there.
            delattr(sys.modules[package], attribute)


def dependents_of(module: str) -> set[str]:
    """Give every loaded module of ours that imports `module`, or one that does."""
    imports = {
        name: _imports_of(Path(loaded.__file__))
        for name, loaded in list(sys.modules.items())
        if name.split(".")[0] in {"app", "tests"} and loaded.__file__
    }
    return _reaching(module, imports)


def _reaching(module: str, imports: Mapping[str, set[str]]) -> set[str]:
    found, new = set[str](), {module}
    while new:
        new = {name for name, taken in imports.items() if taken & new} - found
        found |= new
    return found


def _imports_of(path: Path) -> set[str]:
    """Give what a file imports; of `from a import b` both, because b may be a module."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names
