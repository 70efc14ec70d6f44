"""Golden stories: whole histories of the machines as text.

`pytest tests/server/core/test_stories.py --rewrite-stories` writes them anew, to be reviewed as a diff.
"""

from pathlib import Path

import pytest

from tests.server.core.stories import rewritten

STORIES = sorted((Path(__file__).resolve().parent.parent.parent / "stories").glob("*.txt"))


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story_is_unchanged(path: Path, request: pytest.FixtureRequest) -> None:
    told = path.read_text()
    really = rewritten(told)
    if request.config.getoption("--rewrite-stories", default=False):
        path.write_text(really)
    else:
        assert really == told, "if this is meant to be, rewrite the stories with --rewrite-stories and review the diff"


def test_there_are_stories() -> None:
    assert len(STORIES) >= 20
