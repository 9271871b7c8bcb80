"""The documents say what is true: their examples run, and their names exist."""

import ast
import base64
import inspect
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from app.callbacks import Backoff, Breaker, Callbacks, Envelope, Event, Party, testing
from app.callbacks.forward import sign
from app.callbacks.loader import load
from app.cli import app as command_line
from app.dispatch.options import DispatchOptions
from app.dispatch.registry import TIMEOUT
from app.dispatch.schedule import MAX_ATTEMPTS, wait_after
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "callbacks.md"
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/callbacks.md",
        "docs/logs.md",
        "docs/retention.md",
        "docs/reliability.md",
        "docs/security.md",
        "SECURITY.md",
    )
]
SETTINGS = {name.upper() for name in Settings.model_fields}
# Read by others than `app.settings`: by settings themselves, by make, and by a bucket's library.
OTHER_VARIABLES = {
    "SECRETS_DIR",
    "ENV_FILE",
    "NAME_FILE",
    "TEST_DATABASE_URL",
    "TEST_PG_BIN",
    "ALL_EXTRAS",
    "POSTGRES_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_REGION",
    # What `command` gives to its program.
    "ATLAS_EVENT_TYPE",
    "ATLAS_EVENT_ID",
    "ATLAS_DELIVERY_ID",
    "ATLAS_ENVELOPE_ID",
    "ATLAS_ATTEMPT",
}
BUILT_IN = sorted(
    f"app.callbacks.{path.stem if path.is_file() else path.name}"
    for path in (ROOT / "app" / "callbacks").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
GROUPS = "callbacks|deliveries|events|keys"
SECRET = "whsec_" + "QWxsIGdvb2QgdGhpbmdzIGNvbWUgaW4gdGhyZWVzLi4u"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def file_of(block: str) -> str:
    first = block.partition("\n")[0]
    assert re.fullmatch(r"# \w+\.py", first), f"the block names no file: {first}"
    return first.removeprefix("# ")


EXAMPLES = {file_of(block): block for block in blocks(GUIDE, "python")}
TESTS = [name for name in EXAMPLES if name.startswith("test_")]
MODULES = [name for name in EXAMPLES if not name.startswith("test_")]


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """All examples of the guide, as files in one folder from which they can be imported."""
    for name, block in EXAMPLES.items():
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in EXAMPLES:
        sys.modules.pop(name.removesuffix(".py"), None)


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)  # type: ignore[call-arg]


def imported(name: str) -> ModuleType:
    return import_module(name.removesuffix(".py"))


class TestExamplesOfTheGuide:
    def test_each_has_a_file_of_its_own(self) -> None:
        assert len(blocks(GUIDE, "python")) == len(EXAMPLES)

    @pytest.mark.parametrize("name", MODULES)
    def test_run(self, folder: Path, name: str) -> None:
        module = imported(name)

        assert str(folder / name) == module.__file__

    @pytest.mark.usefixtures("folder")
    @pytest.mark.parametrize("name", [name for name in MODULES if name != "receiver.py"])
    def test_register_what_the_service_loads(self, name: str) -> None:
        loaded = load(f"{name.removesuffix('.py')}:callbacks", settings(forward_secrets=[SECRET]))

        assert loaded

    def test_of_tests_pass(self, folder: Path) -> None:
        """As an author runs them: the settings of this project's own tests do not count."""
        options = ["-q", "-W", "error", "-p", "no:asyncio", "-p", "no:cacheprovider"]

        ran = subprocess.run(
            [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), *TESTS],
            cwd=folder,
            env={"PYTHONPATH": f"{ROOT}:{folder}"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

        assert 0 == ran.returncode, ran.stdout + ran.stderr
        written = sum(EXAMPLES[name].count("\ndef test_") for name in TESTS)
        assert f"{written} passed" in ran.stdout

    @pytest.mark.usefixtures("folder")
    async def test_of_patterns_ask_for_what_they_say(self) -> None:
        callbacks: Callbacks = imported("patterns.py").callbacks
        real = testing.make_event("envelope.signed", account="acme")
        test = testing.make_event("envelope.signed", account="acme", data={"is_test": True})

        assert {"close_deal": testing.Done(), "crm": testing.Done()} == await testing.deliver(
            callbacks, real
        )
        assert isinstance((await testing.deliver(callbacks, test))["close_deal"], testing.Skipped)

    @pytest.mark.usefixtures("folder")
    def test_of_a_receiver_accepts_what_forward_signs(self) -> None:
        key = base64.b64decode(SECRET.removeprefix("whsec_"))
        headers = sign(b'{"type":"envelope.signed"}', "msg_1", [key], at=int(time.time()))

        said = imported("receiver.py").accept(b'{"type":"envelope.signed"}', headers, secret=SECRET)

        assert {"type": "envelope.signed"} == said

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_elsewhere_are_python_that_runs(self, path: Path) -> None:
        for block in blocks(path, "python") if path != GUIDE else ():
            space: dict[str, Any] = {"__name__": "example"}

            exec(compile(block, path.name, "exec"), space)  # noqa: S102  # that is what it is for

            assert len(space["callbacks"]) > 0


def rows(text: str, *, header: str) -> list[list[str]]:
    """Give the cells of the table whose header line begins so."""
    found = re.search(rf"^{re.escape(header)}.*\n\|[-| :]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, f"no table begins with {header!r}"
    lines = found[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


class TestTables:
    def test_have_every_field_of_an_event(self) -> None:
        listed = [
            n for row in rows(GUIDE.read_text(), header="| Field of `Event`") for n in named(row[0])
        ]

        # Two of them are made when they are asked for, behind a property of that name.
        assert sorted(field.name.removeprefix("_") for field in fields(Event)) == sorted(listed)

    def test_have_every_field_of_an_envelope(self) -> None:
        table = rows(GUIDE.read_text(), header="| Fields of `Envelope`")

        assert sorted(field.name for field in fields(Envelope)) == sorted(
            name for row in table for name in named(row[0])
        )
        assert {field.name for field in fields(Party)} <= {
            n for row in table for n in named(row[1])
        }

    def test_have_every_option_of_a_callback(self) -> None:
        options = [
            name
            for name, parameter in inspect.signature(Callbacks.on).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]

        assert options == [
            name
            for row in rows(GUIDE.read_text(), header="| Option | Default")
            for name in named(row[0])
        ]

    def test_have_every_option_of_a_breaker(self) -> None:
        table = rows(GUIDE.read_text(), header="| Option of `Breaker`")

        assert [field.name for field in fields(Breaker)] == [
            n for row in table for n in named(row[0])
        ]

    def test_have_the_waits_that_come_of_the_defaults(self) -> None:
        waits = [
            wait_after(attempt, backoff=Backoff(), noise=0.5) for attempt in range(1, MAX_ATTEMPTS)
        ]
        begins = [sum(waits[:n], timedelta(0)) for n in range(MAX_ATTEMPTS)]
        expected = [
            [str(number), spoken(begin), spoken(wait)]
            for number, (begin, wait) in enumerate(zip(begins, waits, strict=False), start=1)
        ]

        *table, last = rows(GUIDE.read_text(), header="| Attempt | begins after")

        assert expected == [row[:3] for row in table]
        assert [str(MAX_ATTEMPTS), spoken(begins[-1])] == last[:2]

    def test_have_the_numbers_of_the_code(self) -> None:
        text = " ".join(GUIDE.read_text().split())

        assert f"| `timeout` | {TIMEOUT.total_seconds():g} s |" in text
        assert f"| `max_attempts` | {MAX_ATTEMPTS} |" in text
        assert f"Up to {DispatchOptions().stuck_cap} such calls" in text
        assert timedelta(minutes=10) == DispatchOptions().park_after
        assert f"| `failure_rate` | {Breaker().failure_rate} |" in text
        assert f"| `calls` | {Breaker().calls} |" in text
        assert f"| `probes` | {Breaker().probes} |" in text

    def test_have_every_event_of_the_service(self) -> None:
        source = "".join(path.read_text() for path in (ROOT / "app").rglob("*.py"))
        raised = set(re.findall(r'^[A-Z]+ = "(receiver\.\w+)"$', source, re.MULTILINE))

        table = rows(GUIDE.read_text(), header="| Type | When")

        assert raised == {row[0].strip("`") for row in table}


def spoken(time: timedelta) -> str:
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


class TestNames:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_of_built_in_callbacks_exist(self, path: Path) -> None:
        for name in re.findall(r"(app\.callbacks\.\w+):callbacks", path.read_text()):
            made = import_module(name).callbacks

            assert isinstance(made, Callbacks) or callable(made)

    @pytest.mark.parametrize("name", BUILT_IN)
    def test_of_all_built_in_callbacks_are_in_the_guide(self, name: str) -> None:
        if hasattr(import_module(name), "callbacks"):
            assert f"`{name}:callbacks`" in GUIDE.read_text()

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_of_settings_exist(self, path: Path) -> None:
        words = re.findall(r"(?<![\w$…])[A-Z]+(?:_[A-Z]+)+(?![\w…])", path.read_text())

        assert not set(words) - SETTINGS - OTHER_VARIABLES

    @pytest.mark.parametrize(
        "name",
        sorted(
            name
            for name in SETTINGS
            if name.split("_")[0] in {"FORWARD", "SLACK", "ARCHIVE", "PUBLISH", "COMMAND"}
        ),
    )
    def test_of_all_settings_of_built_in_callbacks_are_in_the_guide(self, name: str) -> None:
        assert name in GUIDE.read_text()

    @pytest.mark.parametrize("name", sorted(SETTINGS))
    def test_of_all_settings_are_in_the_readme(self, name: str) -> None:
        assert name in (ROOT / "README.md").read_text()

    @pytest.mark.parametrize(
        "path", [*DOCUMENTS, ROOT / ".env.example"], ids=lambda path: path.name
    )
    def test_of_files_exist(self, path: Path) -> None:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), target

    def test_of_sections_exist(self) -> None:
        text = GUIDE.read_text()
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

        assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= anchors


def commands(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Give each command that a text names, as its verbs and its flags."""
    for said in re.findall(rf"(?:python -m app |`(?=(?:{GROUPS}) ))([^`\n]*)", path.read_text()):
        words = shlex.split(said.split(" #")[0])
        verbs = [word for word in words if re.fullmatch(r"[a-z]+", word)]
        yield verbs, [word for word in words if word.startswith("--")]


class TestCommands:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_exist_with_all_their_flags(self, path: Path) -> None:
        for verbs, flags in commands(path):
            known = {flag for parameter in command_of(verbs).params for flag in parameter.opts}

            assert not set(flags) - known - {"--help"}, f"{verbs} in {path.name}"

    def test_are_all_in_the_readme(self) -> None:
        text = (ROOT / "README.md").read_text()
        table = " ".join(row[0] for row in rows(text, header="| Verb"))

        for group, verb in every_verb():
            assert re.search(rf"\b{group}\b", table), group
            assert re.search(rf"\b{verb}\b", table), f"{group} {verb}"


def command_of(verbs: list[str]) -> Any:
    command: Any = typer.main.get_command(command_line)
    for verb in verbs:
        if not hasattr(command, "commands"):
            break
        assert verb in command.commands, f"there is no verb {verb!r}"
        command = command.commands[verb]
    return command


def every_verb() -> Iterator[tuple[str, str]]:
    top: Any = typer.main.get_command(command_line)
    for group, command in top.commands.items():
        for verb in getattr(command, "commands", (group,)):
            yield group, verb


def logged() -> set[str]:
    """Find the names of all log lines: first arguments, `noun.participle`, of calls that log."""
    names = set()
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _logs(node.func):
                names |= {n for argument in node.args if (n := _text(argument))}
    return names


def _logs(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return isinstance(function.value, ast.Name) and function.value.id == "log"
    # Where the level depends on what happened, it has a name of its own.
    return isinstance(function, ast.Name) and function.id == "level"


def _text(argument: ast.expr) -> str | None:
    is_name = isinstance(argument, ast.Constant) and re.fullmatch(
        r"[a-z]+\.[a-z_]+", str(argument.value)
    )
    return str(argument.value) if is_name and isinstance(argument, ast.Constant) else None


class TestLogLines:
    def test_are_all_described(self) -> None:
        assert logged() == described_lines()


def described_lines() -> set[str]:
    text = (ROOT / "docs" / "logs.md").read_text()
    return set(
        re.findall(
            r"^\| `([a-z]+\.[a-z_]+)` \| (?:as|info|warning|error|critical)", text, re.MULTILINE
        )
    )
