"""The switch that rewrites the golden stories instead of comparing them."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--rewrite-stories`; review the diff it leaves."""
    parser.addoption("--rewrite-stories", action="store_true", help="write what the machines do into tests/stories")
