"""The committed OpenAPI document is what the routes say, and says all that a reader needs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.main import describe
from app.web.openapi import TAGS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "openapi.json"
OPEN = {"/livez", "/readyz", "/webhooks/atlas", "/webhooks/atlas/{account}"}


@pytest.fixture(name="document", scope="module")
def _document() -> dict[str, Any]:
    return describe()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


class TestCommittedDocument:
    def test_is_what_the_routes_say(self, document: dict[str, Any]) -> None:
        committed = json.loads(COMMITTED.read_text("utf-8"))

        assert committed == json.loads(json.dumps(document)), (
            "docs/openapi.json is not what the routes say: write it with `make openapi`"
        )

    def test_is_written_without_keys_or_database(self, tmp_path: Path) -> None:
        environment = {**os.environ, "ENV_FILE": "", "DATABASE_URL": "oracle://nowhere"}

        said = subprocess.run(
            [sys.executable, "-m", "app", "openapi"],
            cwd=ROOT,
            env={**environment, "API_TOKENS": "no JSON", "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )

        assert COMMITTED.read_text("utf-8") == said.stdout


class TestDocument:
    def test_says_of_every_operation_what_it_is(self, document: dict[str, Any]) -> None:
        for path, method, operation in operations(document):
            assert operation.get("summary"), f"{method} {path} has no summary"
            assert operation.get("tags"), f"{method} {path} has no tag"
            assert path in OPEN or operation.get("description"), f"{method} {path}"

    def test_names_every_operation_once(self, document: dict[str, Any]) -> None:
        names = [operation["operationId"] for _, _, operation in operations(document)]

        assert len(names) == len(set(names))
        assert all(name.replace("_", "").isalnum() for name in names)

    def test_describes_every_tag(self, document: dict[str, Any]) -> None:
        used = {tag for _, _, operation in operations(document) for tag in operation["tags"]}

        assert used == {tag["name"] for tag in document["tags"]}
        assert used <= TAGS.keys()

    def test_wants_a_token_for_all_but_door_and_health(self, document: dict[str, Any]) -> None:
        [scheme] = document["components"]["securitySchemes"]
        for path, method, operation in operations(document):
            expected: list[dict[str, list[str]]] = [] if path in OPEN else [{scheme: []}]
            assert expected == operation["security"], f"{method} {path}"

    def test_names_refusals_as_problems(self, document: dict[str, Any]) -> None:
        for path, method, operation in operations(document):
            for status, response in operation["responses"].items():
                if status[0] in "45" and path not in {"/livez", "/readyz"}:
                    content = response["content"]
                    assert ["application/problem+json"] == list(content), f"{method} {path}"

    def test_refers_to_what_is_there(self, document: dict[str, Any]) -> None:
        known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}

        assert set(references(document)) <= known
        assert "#/components/schemas/Problem" in known

    def test_bounds_every_text_that_is_asked_for(self, document: dict[str, Any]) -> None:
        """Case 180: nothing of any length reaches a validator or the database."""
        for path, method, operation in operations(document):
            for parameter in operation.get("parameters", ()):
                for schema in variants(parameter["schema"]):
                    if path not in OPEN and schema.get("type") == "string":
                        is_bounded = {"maxLength", "enum", "format", "const"} & schema.keys()
                        assert is_bounded, f"{method} {path}: {parameter['name']}"

    def test_explains_every_parameter(self, document: dict[str, Any]) -> None:
        for path, method, operation in operations(document):
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "query":
                    assert parameter.get("description"), f"{method} {path}: {parameter['name']}"

    def test_has_examples_of_what_is_answered(self, document: dict[str, Any]) -> None:
        for name, schema in document["components"]["schemas"].items():
            if schema.get("type") == "object":
                shown = json.dumps(schema)
                has_properties = bool(schema.get("properties"))
                assert not has_properties or "example" in shown or "$ref" in shown, name

    def test_names_no_server_and_no_setting(self, document: dict[str, Any]) -> None:
        assert "servers" not in document


def variants(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf") or [schema]
