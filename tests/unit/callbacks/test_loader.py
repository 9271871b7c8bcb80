"""`CALLBACKS`: what it names, and what its author is told when it names nothing useful."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.callbacks import audit_log
from app.callbacks.loader import load
from app.errors import ConfigError, DuplicateCallback

HEADER = "from app.callbacks import Callbacks\ncallbacks = Callbacks()\n"
ONE = HEADER + '@callbacks.on("*")\ndef keep(event): pass\n'


class Project:
    """A directory of modules, as the author of callbacks has one."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def write(self, name: str, text: str) -> None:
        path = self.home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture(name="project")
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    known = set(sys.modules)
    yield Project(tmp_path)
    for name in set(sys.modules) - known:
        del sys.modules[name]


def refusal(spec: str) -> str:
    with pytest.raises(ConfigError) as raised:
        load(spec)
    assert "CALLBACKS" in str(raised.value)
    return str(raised.value)


class TestLoad:
    def test_modules_of_the_working_directory_are_found(self, project: Project) -> None:
        project.write("mine.py", ONE)

        assert ["keep"] == [callback.name for callback in load("mine:callbacks")]
        assert ["keep"] == [callback.name for callback in load("mine:callbacks")]

    def test_several_are_named_with_commas(self, project: Project) -> None:
        project.write("package/__init__.py", "")
        project.write("package/mine.py", ONE)
        project.write("other.py", ONE.replace("keep", "send"))

        names = [callback.name for callback in load(" package.mine : callbacks, other:callbacks,")]

        assert ["keep", "send"] == names

    @pytest.mark.parametrize("spec", ["", " , "])
    def test_nothing_named_is_nothing_loaded(self, spec: str) -> None:
        assert () == load(spec)

    def test_one_object_named_twice_is_one(self, project: Project) -> None:
        project.write("mine.py", ONE)
        project.write("again.py", "from mine import callbacks")

        assert 1 == len(load("mine:callbacks,mine:callbacks,again:callbacks"))

    def test_two_of_one_name_are_refused_with_both_places(self, project: Project) -> None:
        project.write("mine.py", ONE)
        project.write("other.py", ONE)

        with pytest.raises(DuplicateCallback, match="mine:3 and other:3"):
            load("mine:callbacks,other:callbacks")

    def test_the_built_in_one_is_loaded_like_any_other(self) -> None:
        (callback,) = load("app.callbacks.audit_log:callbacks")

        assert ("audit_log", ("*",)) == (callback.name, callback.patterns)
        assert callback.function is audit_log.audit_log


class TestFunction:
    """What the built-in callbacks are: made of the settings, when somebody names them."""

    MAKES = HEADER + (
        "def make(settings):\n"
        "    made = Callbacks()\n"
        "    made.on(settings)(lambda event: None) if settings == '*' else None\n"
        "    made.on('*', name=settings)(lambda event: None)\n"
        "    return made\n"
    )

    def test_is_called_with_the_settings(self, project: Project) -> None:
        project.write("mine.py", self.MAKES)

        assert ["keep"] == [callback.name for callback in load("mine:make", "keep")]

    def test_is_called_once_if_it_is_named_twice(self, project: Project) -> None:
        project.write("mine.py", self.MAKES)

        assert 1 == len(load("mine:make, mine:make", "keep"))

    def test_that_makes_no_callbacks_is_refused(self, project: Project) -> None:
        project.write("mine.py", "def make(settings): return 7")

        assert "which is a int and no Callbacks object" in refusal("mine:make")

    def test_that_fails_is_named_with_its_error(self, project: Project) -> None:
        project.write("mine.py", "def make(settings): return settings.nothing")

        assert "mine:make" in refusal("mine:make")
        assert "AttributeError" in refusal("mine:make")

    def test_that_misses_a_setting_names_it(self, project: Project) -> None:
        text = "from app.errors import ConfigError\n"
        text += "def make(settings): raise ConfigError('TO_URL is missing')"
        project.write("mine.py", text)

        assert "'mine:make': TO_URL is missing" in refusal("mine:make")


class TestEntryPoint:
    """Callbacks of an installed package have a short name."""

    @pytest.fixture(name="installed", autouse=True)
    def _installed(self, project: Project) -> None:
        project.write("mine.py", ONE)
        points = "[atlas_receiver.callbacks]\nonboarding = mine:callbacks\n"
        project.write("mine-1.0.dist-info/entry_points.txt", points)
        project.write("mine-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: mine\n")
        sys.path.insert(0, str(project.home))

    def test_is_loaded_by_its_name(self) -> None:
        assert ["keep"] == [callback.name for callback in load("onboarding")]

    def test_is_not_loaded_without_being_named(self) -> None:
        assert () == load("")

    def test_one_that_is_not_there_names_those_that_are(self) -> None:
        assert "installed packages offer onboarding" in refusal("onbording")


class TestRefusal:
    @pytest.mark.parametrize("spec", ["mine", "mine:", ":callbacks", ":"])
    def test_without_an_attribute_it_shows_how_to_write_it(self, spec: str) -> None:
        assert "write package.module:attribute" in refusal(spec)

    @pytest.mark.parametrize("spec", ["absent:callbacks", "app.absent:callbacks"])
    def test_a_module_that_is_not_there(self, project: Project, spec: str) -> None:
        text = refusal(spec)

        assert f"there is no {spec.partition(':')[0]!r}" in text
        assert str(project.home) in text

    def test_a_package_that_is_not_there(self, project: Project) -> None:
        assert "there is no 'absent'" in refusal("absent.deep.module:callbacks")
        assert project.home.exists()

    def test_a_module_that_imports_one_that_is_not_there(self, project: Project) -> None:
        project.write("mine.py", "\nimport absent\n")

        text = refusal("mine:callbacks")

        assert "fails on import" in text
        assert "mine.py:2" in text
        assert "No module named 'absent'" in text

    @pytest.mark.parametrize(
        "text, reason",
        [
            ("\n1/0", "mine.py:2: ZeroDivisionError"),
            ("\nraise SystemExit(3)", "mine.py:2: SystemExit: 3"),
            ("\ndef (", "mine.py:2: SyntaxError"),
            (HEADER + "@callbacks.on()\ndef keep(event): pass", "names no event"),
        ],
        ids=["raises", "exits", "syntax", "callback"],
    )
    def test_a_module_that_cannot_be_imported(
        self, project: Project, text: str, reason: str
    ) -> None:
        project.write("mine.py", text)

        assert reason in refusal("mine:callbacks")

    def test_an_attribute_that_is_not_there_names_those_that_are(self, project: Project) -> None:
        project.write("mine.py", ONE.replace("callbacks = ", "hooks = callbacks = "))

        assert "has no 'calbacks'; it has callbacks, hooks" in refusal("mine:calbacks")

    def test_an_attribute_of_another_kind(self, project: Project) -> None:
        project.write("mine.py", "callbacks = []")

        text = refusal("mine:callbacks")

        assert "which is a list and no Callbacks object" in text
        assert "callbacks = Callbacks()" in text

    def test_nothing_registered(self, project: Project) -> None:
        project.write("mine.py", HEADER)

        assert "nothing is registered there" in refusal("mine:callbacks")
