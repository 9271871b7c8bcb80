"""Which changes are made to a module, and which are not."""

import ast

import pytest

from tests.mutants.operators import mutants_of


def names(source: str) -> list[str]:
    return [mutant.name.removeprefix("module: ") for mutant in mutants_of(source)]


class TestAChange:
    @pytest.mark.parametrize(
        "source, expected",
        [
            ("a < b", "a <= b"),
            ("a == b", "a != b"),
            ("a is None", "a is not None"),
            ("not a", "a"),
            ("a and b", "a or b"),
            ("a + b", "a - b"),
            ("min(a)", "max(a)"),
            ("x = 3", "4"),
            ("x = True", "False"),
            ("x = 'word'", "'wordx'"),
            ("a.b = c", "pass"),
            ("a.remove(b)", "pass"),
        ],
    )
    def test_is_one_that_a_tired_author_might_make(self, source: str, expected: str) -> None:
        assert f"{source.removeprefix('x = ')} → {expected}" in names(source)

    def test_is_the_only_one_in_its_mutant(self) -> None:
        sources = [mutant.source for mutant in mutants_of("x = 1\ny = 2")]

        assert ["x = 2\ny = 2", "x = 1\ny = 3"] == sources

    def test_leaves_a_module_that_can_be_read(self) -> None:
        source = "def f(a):\n    if a > 1:\n        raise ValueError('no')\n    return a - 1\n"

        mutants = mutants_of(source)

        assert 8 <= len(mutants)
        assert all(ast.unparse(ast.parse(mutant.source)) != source for mutant in mutants)

    def test_has_a_name_of_its_own_and_the_same_each_time(self) -> None:
        source = "x = 1\ny = 1\n"

        assert ["1 → 2", "1 → 2 #2"] == names(source)
        assert names(source) == names(source)

    def test_is_named_after_where_it_is(self) -> None:
        assert ["A.f: 1 → 2"] == names("class A:\n    def f(self):\n        x = 1\n")


class TestStatementsOfSql:
    def test_are_changed_in_their_own_words(self) -> None:
        statement = "SELECT id FROM t WHERE until <= now() FOR UPDATE SKIP LOCKED"

        changed = [name.rpartition(" → ")[2] for name in names(f"x = {statement!r}")]

        assert ["<", "nothing", "nothing"] == changed

    def test_are_changed_in_pieces_between_values(self) -> None:
        assert ["SELECT a WHERE b < → <="] == names('x = f"SELECT a WHERE b < {now}"')


class TestLeftAlone:
    @pytest.mark.parametrize(
        "source",
        [
            pytest.param('"""What it is for."""', id="docstring"),
            pytest.param("x: int | None", id="annotation"),
            pytest.param("Json = dict[str, int] | None", id="alias"),
            pytest.param("log.info('said', a=1)", id="log"),
            pytest.param("x = 'A message with blanks'", id="prose"),
            pytest.param("x = f'{y} is no time'", id="prose-with-values"),
            pytest.param("__all__ = ['f']", id="public-names"),
            pytest.param("@frozen(slots=True)\nclass A: ...", id="decorator"),
        ],
    )
    def test_is_what_is_no_rule(self, source: str) -> None:
        assert [] == names(source)
