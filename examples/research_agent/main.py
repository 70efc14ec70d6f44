"""A LangGraph agent whose model and tools run on Lattice: it searches, queries, asks for approval, and reports.

    lattice run examples/research_agent/main.py [--refuse] [--model FOLDER]

The model is a small class that follows a fixed plan and streams its answer word by word, so that the example needs no
key. With `--model` a language model of that folder, served by two instances, adds a remark to the answer. The graph,
its checkpoints and the question for approval are LangGraph's, in this process.
"""

import argparse
import csv
import json
import re
import sqlite3
import urllib.request
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command, interrupt

from lattice_client import LangGraphClient, LatticeClient, context

ROOT = Path(__file__).resolve().parent.parent.parent
WEATHER = ROOT / "examples" / "agent" / "data" / "seattle-weather.csv"
QUESTION = "What happens to a question of a task when its worker is lost, and how warm was Seattle in 2015?"


@tool
def search(folder: str, words: str) -> str:
    """Return the paragraph of the documents in a folder that has most of the words."""
    wanted = set(words.lower().split())
    paragraphs = [
        (path.name, " ".join(text.split()))
        for path in sorted(Path(folder).glob("*.md"))
        for text in path.read_text().split("\n\n")
    ]
    name, text = max(paragraphs, key=lambda found: len(wanted & set(re.findall(r"\w+", found[1].lower()))))
    return f"{name}: {text}"


@tool
def query(source: str, sql: str) -> str:
    """Put a CSV file into a SQLite database in memory, and return the first row of a query."""
    connection = sqlite3.connect(":memory:")
    with open(source, newline="") as file:
        header, *rows = csv.reader(file)
    connection.execute(f"create table weather ({', '.join(f'{name} numeric' for name in header)})")
    connection.executemany(f"insert into weather values ({', '.join('?' * len(header))})", rows)
    return json.dumps(connection.execute(sql).fetchone())


@tool
def publish(report: str) -> str:
    """Publish a report, after a person has approved it."""
    return f"published: {report}" if interrupt({"publish": report}) == "yes" else "the report was refused"


class Model(BaseChatModel):
    """A model with a plan: both tools side by side, then the report, then an answer in its own words."""

    folder: str
    source: str
    served: str = ""  # The name of the language model that adds a remark.

    @property
    def _llm_type(self) -> str:
        return "plan"

    def _answer(self, messages: list[BaseMessage]) -> AIMessage:
        results = [message for message in messages if isinstance(message, ToolMessage)]
        if not results:
            sql = "select max(temp_max), date from weather where date like '2015%'"
            words = "worker lost question withdrawn attempt"
            return AIMessage(
                "",
                tool_calls=[
                    {"name": "search", "args": {"folder": self.folder, "words": words}, "id": "search"},
                    {"name": "query", "args": {"source": self.source, "sql": sql}, "id": "query"},
                ],
            )
        found = {message.name: str(message.content) for message in results}
        if "publish" not in found:
            degrees, day = json.loads(found["query"])
            report = f"{found['search']} The warmest day was {day[:10]}, with {degrees} degrees."
            return AIMessage("", tool_calls=[{"name": "publish", "args": {"report": report}, "id": "publish"}])
        return AIMessage(f"Done; {found['publish']}")

    def _generate(self, messages: list[BaseMessage], *_: Any, **__: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages))])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: Any = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **_: Any,
    ) -> Iterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        calls = [
            {"name": call["name"], "args": json.dumps(call["args"]), "id": call["id"], "index": number}
            for number, call in enumerate(answer.tool_calls)
        ]
        pieces: list[Any] = re.findall(r"\S+\s*", str(answer.content)) or [""]
        remark = _remark(self.served, str(answer.content)) if self.served and not calls else ()
        for piece in chain(pieces, remark):
            chunk = ChatGenerationChunk(message=AIMessageChunk(piece, tool_call_chunks=calls))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk


def _remark(name: str, text: str) -> Iterator[str]:
    """Stream the remark of a served model about a text."""
    model = context.llm(name)
    message = {"role": "user", "content": text}
    body = {"model": model.model, "messages": [message], "max_tokens": 40, "stream": True}
    headers = {"authorization": f"Bearer {model.api_key}", "content-type": "application/json"}
    request = urllib.request.Request(f"{model.base_url}/chat/completions", json.dumps(body).encode(), headers)
    yield f"\n{name} says: "
    is_whole = False
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
                    is_whole = bool(choice.get("finish_reason"))
    if not is_whole:
        raise RuntimeError("the connection broke")


def graph(model: Model) -> "StateGraph[Any]":
    """Return the agent: the model and its tools in turns."""

    def think(state: MessagesState) -> dict[str, Any]:
        """Ask the model for the next step."""
        return {"messages": [model.invoke(state["messages"])]}

    builder = StateGraph(MessagesState)
    builder.add_node("think", think)
    builder.add_node("tools", ToolNode([search, query, publish]))
    builder.add_edge(START, "think")
    builder.add_conditional_edges("think", tools_condition)
    builder.add_edge("tools", "think")
    return builder


def main() -> None:
    """Run the agent once; approve its report unless told to refuse it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--refuse", action="store_true")
    parser.add_argument("--model", default="")
    given = parser.parse_args()
    answer, served = "no" if given.refuse else "yes", "writer" if given.model else ""
    with LatticeClient() as client, LangGraphClient() as lattice:
        if served:
            client.llm.start(served, given.model, engine="transformers", cpu=0.5, replicas=2)
        model = Model(folder=str(ROOT / "docs"), source=str(WEATHER), served=served)
        app = lattice.compile(graph(model), resources={"tools.query": {"cpu_mem": 256}}, checkpointer=InMemorySaver())
        config = {"configurable": {"thread_id": "research"}}
        state: Any = {"messages": [("user", QUESTION)]}
        print(f"? {QUESTION}")
        while state is not None:
            steps = app.stream(state, config, stream_mode=["updates", "messages"])
            state = None
            for mode, item in steps:
                if mode == "messages" and isinstance(item[0], AIMessageChunk):
                    print(item[0].content, end="", flush=True)
                elif mode == "updates" and "__interrupt__" in item:
                    print(f"! publish this? {item['__interrupt__'][0].value['publish']} → {answer}")
                    state = Command(resume=answer)
                elif mode == "updates" and "tools" in item:
                    print(*(f"- {message.name}: {message.content}" for message in item["tools"]["messages"]), sep="\n")
        print(f"\nlattice runs show {app.last_run_id}")
        if served:
            client.llm.stop(served)


if __name__ == "__main__":
    main()
