"""Owns the questions that instances and tasks ask the server, and the form of their answers.

Rule: a question of the server's own is one whose name begins with `SYSTEM`; no caller of a run gets it.
"""

import json
from collections.abc import Mapping
from typing import Any

from lattice_server.core.messages import AnswerQuestion, QuestionAsked
from lattice_server.core.model import Failure, Payload
from lattice_server.core.model import FailureKind as TaskFailureKind
from lattice_server.core.run.open_run import answer_to

SYSTEM = "lattice/"
PROGRAM = "lattice/instance.program"
REPORT = "lattice/instance.report"
CONTROL = "lattice/instance.control"
ENDPOINT = "lattice/service.endpoint"
LLM = "lattice/llm.endpoint"
GATEWAY_START = "lattice/gateway.start"
GATEWAY_READY = "lattice/gateway.ready"
GATEWAY_ROUTES = "lattice/gateway.routes"
GATEWAY_KEY = "lattice/gateway.key"
GATEWAY_REPORT = "lattice/gateway.report"
GATEWAY_WAIT = "lattice/gateway.wait"
GATEWAY_BUDGET = "lattice/gateway.budget"
GATEWAY_PERMITS = "lattice/gateway.permits"
JSON = "application/json"


class QuestionFormError(Exception):
    """The value of a question is not an object in JSON."""


def content_of(question: QuestionAsked) -> Mapping[str, Any]:
    """Return the value of a question; empty for one without a value. Raises QuestionFormError."""
    payload = question.payload
    if payload.media_type != JSON or not isinstance(payload.content, str | bytes):
        text = f"{question.name} takes a dict that JSON can have, and no tuples or other objects in it"
        raise QuestionFormError(f"{text}; the value was sent as {payload.media_type}")
    try:
        found = json.loads(payload.content)
    except ValueError as error:
        raise QuestionFormError(f"the value of {question.name} is not JSON: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise QuestionFormError(f"{question.name} takes a dict, not {type(found).__name__}")
    return found


def answered(question: QuestionAsked, value: Mapping[str, Any]) -> AnswerQuestion:
    """Return the answer that carries a value."""
    return answer_to(question, Payload(JSON, json.dumps(value)))


def refused(question: QuestionAsked, kind: str, message: str) -> AnswerQuestion:
    """Return the answer that is an error of a type."""
    return answer_to(question, Failure(TaskFailureKind.USER_ERROR, message, type=kind))
