"""The page on the library: its examples are true."""

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "book" / "reference.md"


def test_examples_of_the_page_print_what_stands_there():
    blocks = re.findall(r"```pycon\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    page = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "reference.md", str(PAGE), 0)
    assert len(page.examples) > 10
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(page, out=said.append)
    assert "".join(said) == ""
