"""Parameters are what their declared types say, whoever hands them over."""

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
]


@pytest.mark.parametrize("name, value, declared, wanted", GOOD, ids=str)
def test_value_becomes_its_declared_type(name, value, declared, wanted):
    found = parameters.convert(name, value, declared)
    assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("name, value, declared", BAD, ids=str)
def test_what_cannot_be_read_is_refused_by_name(name, value, declared):
    with pytest.raises(ValueError, match=name):
        parameters.convert(name, value, declared)


def test_names_of_a_notebook_are_converted_where_they_stand():
    namespace = {}
    exec("seeds: list[int] = '[010]'\nothers: bool = 'False'\ndata: str = 7\nfree = '1'", namespace)
    parameters.read(namespace)
    assert [namespace[name] for name in ("seeds", "others", "data", "free")] == [[10], False, "7", "1"]
