"""docs/support.md says what the methods and the tests say."""

from pathlib import Path

from support import table

PAGE = Path(__file__).parent.parent / "docs" / "support.md"


def test_the_page_of_what_runs_where_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == table()
