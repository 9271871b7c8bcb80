"""Every small change of a module, in the order of its lines, and the same each time."""

import ast
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Final

from tests.mutants import sql

_COMPARISONS: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ORDERED: Final = (ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_ARITHMETIC: Final[dict[type[ast.operator], type[ast.operator]]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}
# What somebody reads, and nothing depends on.
_TOLD: Final = frozenset({"log", "warnings"})


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    name: str
    line: int
    source: str


def mutants_of(source: str) -> list[Mutant]:
    """Give every mutant of a module."""
    tree = ast.parse(source)
    seen: Counter[str] = Counter()
    mutants = []
    for change in _Finder().find(tree):
        text = ast.unparse(ast.fix_missing_locations(change.tree))
        seen[change.name] += 1
        number = f" #{seen[change.name]}" if seen[change.name] > 1 else ""
        mutants.append(Mutant(change.name + number, change.line, text))
    return mutants


@dataclass(frozen=True)
class _Change:
    name: str
    line: int
    tree: ast.Module


class _Finder:
    """Walks a module; what it does not walk into is not changed."""

    def find(self, tree: ast.Module) -> Iterator[_Change]:
        self._tree = tree
        yield from self._walk(tree, (), "")

    def _walk(
        self, node: ast.AST, path: tuple[tuple[str, int], ...], scope: str
    ) -> Iterator[_Change]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for new in _replacements(node):
            yield self._change(node, new, path, scope)
        for text, before, after in _statements(node):
            new = ast.Constant(text)
            yield self._change(node, new, path, scope, told=f"{before} → {after}")
        for field, position, child in _children(node):
            yield from self._walk(child, (*path, (field, position)), scope)

    def _change(
        self,
        node: ast.AST,
        new: ast.AST,
        path: tuple[tuple[str, int], ...],
        scope: str,
        *,
        told: str | None = None,
    ) -> _Change:
        tree = deepcopy(self._tree)
        _put(tree, path, new)
        text = told or f"{_short(node)} → {_short(new)}"
        return _Change(f"{scope or 'module'}: {text}", getattr(node, "lineno", 0), tree)


def _put(tree: ast.AST, path: tuple[tuple[str, int], ...], new: ast.AST) -> None:
    for field, position in path[:-1]:
        child = getattr(tree, field)
        tree = child[position] if position >= 0 else child
    field, position = path[-1]
    if position >= 0:
        getattr(tree, field)[position] = new
    else:
        setattr(tree, field, new)


def _children(node: ast.AST) -> Iterator[tuple[str, int, ast.AST]]:
    for field, value in ast.iter_fields(node):
        if _is_left_alone(node, field):
            continue
        if isinstance(value, ast.AST):
            yield field, -1, value
        elif isinstance(value, list):
            for position, child in enumerate(value):
                if isinstance(child, ast.AST) and not _is_told(child):
                    yield field, position, child


def _is_left_alone(node: ast.AST, field: str) -> bool:
    """Types, decorators and messages are no rules of the product."""
    if field in {"annotation", "returns", "decorator_list", "type_params", "type"}:
        return True
    if isinstance(node, ast.Raise):
        return not isinstance(node.exc, ast.Call) or field == "cause"
    return isinstance(node, ast.JoinedStr) and _is_prose(node)


def _is_told(node: ast.AST) -> bool:
    """Docstrings, what goes to the log, and lists of public names."""
    if isinstance(node, ast.Assert | ast.Import | ast.ImportFrom):
        return True
    if not isinstance(node, ast.Expr):
        return _is_alias(node) or _is_list_of_names(node)
    value = node.value
    if isinstance(value, ast.Constant):
        return True
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    return isinstance(value.func.value, ast.Name) and value.func.value.id in _TOLD


def _is_alias(node: ast.AST) -> bool:
    """`Json = dict[str, Any]`: a name for a type."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Subscript | ast.BinOp)
        and (
            isinstance(node.targets[0], ast.Name)
            and node.targets[0].id[:1].isupper()
            and not node.targets[0].id.isupper()
        )
    )


def _is_list_of_names(node: ast.AST) -> bool:
    """`__all__` says what may be imported, and a linter what is missing in it."""
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(value=value):
            yield from (ast.Constant(other) for other in _other_values(value))
        case ast.comprehension(ifs=[_, *_]):
            yield _with(node, ifs=[])
        case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
            yield _with(node, func=ast.Name(_CALLS[name], ast.Load()))
        case _:
            yield from _other_operators(node)
            yield from _other_ways(node)


def _other_operators(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            yield _with(node, ops=[_COMPARISONS[type(op)]()])
        case ast.BoolOp(op=op):
            yield _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in _ARITHMETIC:
            yield _with(node, op=_ARITHMETIC[type(op)]())


def _other_ways(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            if not _is_swapped_anyway(test):
                yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.Continue() | ast.Break() | ast.Delete() | ast.Expr():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.match_case(guard=guard) if guard is not None:
            yield _with(node, guard=ast.UnaryOp(ast.Not(), guard))
        case ast.MatchSingleton(value=bool(value)):
            yield ast.MatchSingleton(not value)


def _other_values(value: object) -> Iterator[bool | float | str | bytes]:
    match value:
        case bool():
            yield not value
        case int() | float():
            yield value + 1
        case str() if sql.is_statement(value):
            return
        case str() if " " not in value:
            yield value + "x"
        case bytes():
            yield value + b"x"


def _statements(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (sql.is_statement(node.value) or " " in node.value)
    ):
        yield from sql.changes(node.value)


def _is_prose(node: ast.JoinedStr) -> bool:
    texts = [str(part.value) for part in node.values if isinstance(part, ast.Constant)]
    return any(" " in text for text in texts) and not any(map(sql.is_statement, texts))


def _is_swapped_anyway(test: ast.expr) -> bool:
    """Its comparison is turned round already, which is the same as to negate it."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    return isinstance(test, ast.Compare) and not isinstance(test.ops[0], _ORDERED)


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(ast.fix_missing_locations(deepcopy(node))).split())
    return text if len(text) <= 90 else text[:87] + "..."
