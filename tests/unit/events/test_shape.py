"""The shape of a body: names and JSON types, and never a value."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.events.reading import read, read_watchfully
from app.events.shape import MAX_NAME, MAX_PATH, MAX_TRAITS, Trait, name_of, shape_of
from tests.factories import SIGN_TOKEN, SIGNER, make_body


def shown(document: dict[str, Any]) -> set[str]:
    return {f"{kind} {path}" for kind, path in shape_of(document)}


def of_body(body: bytes) -> set[str]:
    return shown(read(body)[0])


class TestFields:
    def test_have_a_path_and_a_type(self) -> None:
        document = {
            "a": "x",
            "b": 1,
            "c": 1.5,
            "d": True,
            "e": None,
            "f": {"g": []},
            "h": [1, "x", {"i": None}, [2]],
        }

        assert {
            "field a:string",
            "field b:number",
            "field c:number",
            "field d:boolean",
            "field e:null",
            "field f:object",
            "field f.g:array",
            "field h:array",
            "field h[]:number",
            "field h[]:string",
            "field h[]:object",
            "field h[]:array",
            "field h[].i:null",
        } == shown(document)

    def test_of_a_list_of_people_are_those_of_each(self) -> None:
        parties = [{"email": "a@x.org"}, {"email": None, "name": "Bob"}]

        assert {
            "field parties:array",
            "field parties[]:object",
            "field parties[].email:string",
            "field parties[].email:null",
            "field parties[].name:string",
        } == shown({"parties": parties})

    def test_of_numbers_too_long_and_of_repeated_keys_are_known(self) -> None:
        long = read(b'{"a": %s, "b": "\\ud800"}' % (b"1" * 5000))[0]
        twice = read_watchfully(b'{"a": {"b": 1, "b": 2}}')

        assert {"field a:number", "field b:string"} == shown(long)
        assert {"field a:object", "field a.b:number"} == shown(twice)

    def test_in_the_metadata_are_the_callers(self) -> None:
        document = {"metadata": {"secret-42": {"x": 1}}, "data": {"metadata": [{"y": 1}]}}

        assert {"field metadata:object", "field data:object", "field data.metadata:array"} == (
            shown(document)
        )

    @pytest.mark.parametrize("name", ["extracted_data", "extraction"])
    def test_deep_in_what_was_extracted_are_left_out(self, name: str) -> None:
        document = {name: {"rent": {"Main Street 7": 1}, "rooms": [{"n": 1}]}}

        assert {
            f"field {name}:object",
            f"field {name}.rent:object",
            f"field {name}.rooms:array",
        } == (shown(document))

    def test_of_a_list_that_was_extracted_are_those_of_its_elements(self) -> None:
        found = shown({"extraction": [{"rent": {"deep": 1}}]})

        assert {
            "field extraction:array",
            "field extraction[]:object",
            "field extraction[].rent:object",
        } == found


class TestStatusWords:
    def test_are_kept_with_where_they_stood(self) -> None:
        document = {
            "status": "signed",
            "fields_status": "confirmed",
            "fieldsStatus": "draft",
            "parties": [{"status": "viewed"}],
        }

        found = {trait.path for trait in shape_of(document) if trait.kind == "status"}

        assert {
            "status=signed",
            "fields_status=confirmed",
            "fieldsStatus=draft",
            "parties[].status=viewed",
        } == found

    @pytest.mark.parametrize(
        "word", ["ada@example.com", "x" * 33, "two words", "", "id-4711", "https://x.org/?token=y"]
    )
    def test_are_words_and_nothing_else(self, word: str) -> None:
        assert Trait("status", "status=other") in shape_of({"status": word})

    @pytest.mark.parametrize("value", [None, 1, {"x": 1}, ["signed"]])
    def test_are_texts(self, value: Any) -> None:
        assert {"field"} == {trait.kind for trait in shape_of({"status": value})}


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "ada@example.com",
            "4711",
            "01890a5d-ac96-774b-bcce-b302099a8057",
            "deadbeef01",
        ],
    )
    def test_that_are_data_are_not_kept(self, name: str) -> None:
        assert "*" == name_of(name)

    @pytest.mark.parametrize("name", ["email", "x2", "facade", "línea", "a b", "defaced", "", "[]"])
    def test_are_kept_as_they_are(self, name: str) -> None:
        assert name == name_of(name)

    def test_never_hold_what_cannot_be_stored_or_shown(self) -> None:
        assert "a\ufffdb\ufffd\ufffd" == name_of("a\x00b\ud800\n")
        assert MAX_NAME == len(name_of("x" * 1000))


class TestLimits:
    def test_of_depth(self) -> None:
        document: dict[str, Any] = {"end": 1}
        for _ in range(60):
            document = {"a": document}

        assert 8 == len(shape_of(document))

    def test_of_paths(self) -> None:
        document: dict[str, Any] = {}
        for _ in range(6):
            document = {"x" * 90: document}

        assert max(len(trait.path) for trait in shape_of(document)) <= MAX_PATH + len(":object")

    @pytest.mark.parametrize(
        "document",
        [
            pytest.param({f"f{'x' * n}": n for n in range(80)} | {"a": {}}, id="names"),
            pytest.param(
                {f"a{n:x}z": {f"b{m:x}z": m for m in range(9)} for n in range(99)}, id="two"
            ),
            pytest.param({f"a{n:x}z": n for n in range(6000)}, id="many"),
            pytest.param(
                {f"a{n:x}z": {f"b{m:x}z": {"c": 1} for m in range(99)} for n in range(99)},
                id="three",
            ),
        ],
    )
    def test_of_traits_are_kept(self, document: dict[str, Any]) -> None:
        assert 80 < len(shape_of(document)) <= MAX_TRAITS

    def test_of_elements(self) -> None:
        document = {"a": [1] * 50 + ["x"]}

        assert {"field a:array", "field a[]:number"} == shown(document)

    def test_of_values(self) -> None:
        wide = {"a": [{f"k{n}z": 1 for n in range(99)} for _ in range(50)]}
        document = {"one": wide, "two": wide}

        assert len(shape_of(document)) <= MAX_TRAITS


class TestSecrets:
    def test_no_value_is_in_a_shape(self) -> None:
        found = " ".join(of_body(make_body(event_id="evt_4711", external_id="ext-7")))

        assert "field parties[].sign_url:string" in found
        for value in (SIGNER, SIGN_TOKEN, "evt_4711", "ext-7", "c-1", "customer"):
            assert value not in found

    @given(
        st.dictionaries(
            st.text(max_size=8),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=8), inner, max_size=3)
                ),
                max_leaves=12,
            ),
            max_size=8,
        )
    )
    def test_whatever_it_is_it_can_be_stored(self, document: dict[str, Any]) -> None:
        for trait in shape_of(document):
            assert trait.path.isprintable()
            assert trait.path.encode()
            assert json.dumps(trait)
