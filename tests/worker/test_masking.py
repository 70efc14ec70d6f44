"""Secrets in what attempts write: each form is masked, in whatever pieces it comes, and nothing else is changed."""

import base64
import json
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lattice.v1 import worker_pb2

from lattice_worker.masking import Masker

SECRET = "s3cr3t+/=ü value"
FORMS = [
    SECRET,
    json.dumps(SECRET)[1:-1],
    repr(SECRET)[1:-1],
    quote(SECRET, safe=""),
    *(base64.b64encode(b"x" * before + SECRET.encode() + b"after").decode() for before in range(4)),
    base64.urlsafe_b64encode(SECRET.encode()).decode(),
]


def written(masker: Masker, pieces: list[str]) -> str:
    """Return the logged text of an output that is written in pieces."""
    found: list[str] = []
    for piece in pieces:
        masker.log(lambda stream, text, is_truncated: found.append(text), "stdout", piece, False)
    masker.release(lambda stream, text, is_truncated: found.append(text))
    return "".join(found)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_secret_is_masked(form: str) -> None:
    shown = Masker([SECRET]).text(f"before {form} after")
    assert "***" in shown
    assert (shown[:7], shown[-6:]) == ("before ", " after")
    assert form not in shown
    # Of base64, the characters stay that stand for other text as well.
    assert len(core := form[6:-12]) < 8 or core not in shown


@given(st.lists(st.sampled_from([SECRET, "s3cr", "x", "line\n", SECRET[:-1], SECRET * 2]), max_size=8), st.data())
def test_a_secret_in_pieces_is_masked_and_other_text_is_kept(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert written(Masker([SECRET]), pieces) == text.replace(SECRET, "***")


def test_lines_of_a_secret_are_masked_and_short_ones_are_not() -> None:
    masker = Masker(["-----BEGIN KEY-----\nabcdefghijkl\nxyz\n", "short"])
    assert masker.text("abcdefghijkl / xyz / short") == "*** / xyz / short"


def test_streams_do_not_mix() -> None:
    masker, found = Masker([SECRET]), []
    for stream, text in (("stdout", SECRET[:5]), ("stderr", SECRET[5:]), ("stdout", " end")):
        masker.log(lambda *logged: found.append(logged[:2]), stream, text, False)
    assert found == [("stderr", SECRET[5:]), ("stdout", f"{SECRET[:5]} end")]


def test_a_failure_is_masked_and_an_exception_with_a_secret_is_left_out() -> None:
    masker = Masker([SECRET])
    failure = {"kind": "user_error", "message": f"no {SECRET}", "traceback": f"x = {SECRET!r}", "exception": 1}
    answer = {"kind": "result", "items": [{"failure": failure}, {"outputs": {}}], "made": []}
    masked = masker.answer(answer, [b"other", b"pickle of " + SECRET.encode()])
    assert masked["items"][0]["failure"] == {"kind": "user_error", "message": "no ***", "traceback": "x = '***'"}
    assert masked["items"][1] == {"outputs": {}}
    kept = masker.answer({"failure": {**failure, "message": "no"}}, [b"other", b"pickle"])
    assert kept["failure"]["exception"] == 1


def test_values_of_spans_are_masked() -> None:
    masker = Masker([SECRET])
    assert masker.value({"name": SECRET, "attributes": {"n": 1, SECRET: [SECRET, None]}}) == {
        "name": "***",
        "attributes": {"n": 1, "***": ["***", None]},
    }


def test_a_lease_without_secrets_has_no_masker() -> None:
    assert Masker.of(worker_pb2.Assignment(environment={"A": "plain-value"})) is None
    found = Masker.of(worker_pb2.Assignment(environment={"A": SECRET, "B": "plain-value"}, secret_variables=["A"]))
    assert found is not None
    assert found.text(f"{SECRET} plain-value") == "*** plain-value"


def test_value_is_masked_when_it_was_cut_in_the_middle_of_a_secret() -> None:
    masker = Masker(["s3cret-of-the-provider"])
    assert masker.value({"name": "key s3cret-of", "list": ["s3cret-o"]}) == {"name": "key ***", "list": ["***"]}
    assert masker.value("key s3cret-") == "key s3cret-"
