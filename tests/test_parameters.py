"""Parameters are what their declared types say, whoever hands them over."""

import re
from pathlib import Path

import pytest

from mmlib import parameters

GOOD = [
    ("others", "False", "bool", False),
    ("others", "no", "bool", False),
    ("others", "TRUE", "bool", True),
    ("others", True, "bool", True),
    ("grid", "020", "int", 20),
    ("grid", 20, "int", 20),
    ("share", "1e-3", "float", 1e-3),
    ("share", 1, "float", 1.0),
    ("data", 2019, "str", "2019"),
    ("data", "010", "str", "010"),
    ("data", "no", "str", "no"),
    ("data", "", "str", ""),
    ("seeds", "[010, 11]", "list[int]", [10, 11]),
    ("seeds", "[0,1]", "list[int]", [0, 1]),
    ("seeds", "3", "list[int]", [3]),
    ("seeds", 3, "list[int]", [3]),
    ("seeds", (1, 0), "list[int]", [1, 0]),
    ("sizes", "[]", "list[int]", []),
    ("kinds", "[views, seeds]", "list[str]", ["views", "seeds"]),
    ("kinds", '["a, b", "c"]', "list[str]", ["a, b", "c"]),
    ("rates", "[1e-3, 2]", "list[float]", [1e-3, 2.0]),
]
BAD = [
    ("others", "maybe", "bool"),
    ("others", 1, "bool"),
    ("others", "", "bool"),
    ("grid", "many", "int"),
    ("grid", 2.5, "int"),
    ("grid", True, "int"),
    ("grid", None, "int"),
    ("share", "half", "float"),
    ("share", "nan", "float"),
    ("share", True, "float"),
    ("share", None, "float"),
    ("data", 1.5, "str"),
    ("data", True, "str"),
    ("seeds", "[0, 0]", "list[int]"),
    ("seeds", "[-1]", "list[int]"),
    ("seeds", "[]", "list[int]"),
    ("seeds", "[0, x]", "list[int]"),
    ("seeds", "[0", "list[int]"),
    ("seeds", [0.5], "list[int]"),
    ("seeds", {0: 1}, "list[int]"),
    ("kinds", '["a", b]', "list[str]"),
    ("pairs", 99, "int"),
    ("draws", "0", "int"),
    ("level", 1.5, "float"),
    ("level", 1, "float"),
    ("level", 0, "float"),
    ("members", 0, "int"),
    ("members", 17, "int"),
    ("identities", 11, "int"),
    ("identities", -1, "int"),
    ("identities", 0, "float"),
    ("grid_identities", 11, "int"),
    ("picture_identities", 1, "int"),
    ("epochs", 0, "int"),
    ("clips", 0.5, "float"),
    ("hours", 0, "float"),
    ("sizes", "[1, 17]", "list[int]"),
    ("sets", "[ytf, vgg]", "list[str]"),
    ("profile", "huge", "str"),
    ("device", "tpu", "str"),
    ("grid", "corse", "str"),
    ("architecture", "resnet", "str"),
]
EDGES = [
    ("pairs", 100, "int"),
    ("draws", 100, "int"),
    ("members", 1, "int"),
    ("members", 16, "int"),
    ("identities", 0, "int"),
    ("identities", 12, "int"),
    ("sizes", [1, 16], "list[int]"),
]
CHAPTERS = sorted((Path(__file__).parents[1] / "book" / "chapters").glob("*.ipynb"))


@pytest.mark.parametrize("name, value, declared, wanted", GOOD, ids=str)
def test_value_becomes_its_declared_type(name, value, declared, wanted):
    found = parameters.convert(name, value, declared)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("name, value, declared", BAD, ids=str)
def test_what_cannot_be_read_is_refused_by_name(name, value, declared):
    with pytest.raises(ValueError, match=name):
        parameters.convert(name, value, declared)


@pytest.mark.parametrize("name, value, declared", EDGES, ids=str)
def test_ends_of_a_range_are_in_it(name, value, declared):
    assert parameters.convert(name, value, declared) == value


def test_a_message_names_parameter_value_and_range():
    with pytest.raises(ValueError, match="-p members must be 1 to 16, got 17"):
        parameters.convert("-p members", "17", "int")
    with pytest.raises(ValueError, match="^profile must be one of tiny, quick, full, got 'huge'"):
        parameters.convert("profile", "huge", "str")


def declared(chapter):
    """Yield name, element type, default and comment of a chapter's parameters."""
    for name, of in pytest.importorskip("papermill").inspect_notebook(chapter).items():
        kind = of["inferred_type_name"]
        yield name, kind.removeprefix("list[").rstrip("]"), kind, of["default"], of["help"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_numbers_of_a_chapter_have_a_range_and_comments_say_it(chapter):
    for name, element, kind, default, comment in declared(chapter):
        within, words = parameters.RANGES.get(f"{name}: {element}", (None, ""))
        assert within or element not in ("int", "float") or name.endswith("seeds"), name
        parameters.convert(name, default.strip('"').replace("_", "") if element == "int" else default.strip('"'), kind)
        if name not in ("profile", "device", "architecture"):  # which say the default too
            assert {*re.findall(r"\d+|\w{3,}", words)} - {"least", "one", "above", "and", "below"} <= {
                *re.findall(r"\w+", comment)
            }, name


def test_every_range_is_of_a_parameter_that_some_chapter_has():
    names = {f"{name}: {element}" for chapter in CHAPTERS for name, element, *_ in declared(chapter)}
    assert {*parameters.RANGES} <= names


def test_a_store_is_refused_where_tables_of_real_faces_are_read():
    twelve = next(path for path in CHAPTERS if path.stem.startswith("12"))
    with pytest.raises(ValueError, match="data=store/: has no meaning here; faces= names"):
        parameters.read_texts(twelve, {"data": "store/"})
    namespace = {"__annotations__": {"data": "str", "faces": "str"}, "data": "store/", "faces": ""}
    with pytest.raises(ValueError, match="faces="):
        parameters.read(namespace)
    parameters.read(namespace | {"data": "simulated"})


def test_names_of_a_notebook_are_converted_where_they_stand():
    namespace = {}
    exec("seeds: list[int] = '[010]'\nothers: bool = 'False'\ndata: str = 7\nfree = '1'", namespace)
    parameters.read(namespace)
    assert [namespace[name] for name in ("seeds", "others", "data", "free")] == [[10], False, "7", "1"]
