"""An agent as a loop in one task: a model picks tools, the tools run as tasks, a person approves, until it is done.

    lattice run examples/agent_loop/main.py ["a question"] [--refuse]

The model is a function that follows the conversation by rules, not a language model: it needs no key and answers the
same each time. The loop, its tools, the stream of its steps and the wait for a person are as they would be with one.
"""

import re
import sys
from typing import Any

from lattice_client import LatticeClient, context, task

QUESTION = "Which of the primes below 100 have digits that add up to 10, and what is their sum?"
SIGNAL = "approval"


@task
def primes_below(limit: int) -> list[int]:
    """A tool: the primes below a limit."""
    return [n for n in range(2, limit) if all(n % divisor for divisor in range(2, int(n**0.5) + 1))]


@task
def digit_sum(number: int) -> int:
    """A tool: the sum of the digits of a number."""
    return sum(map(int, str(number)))


@task
def add_up(numbers: list[int]) -> int:
    """A tool: a sum."""
    return sum(numbers)


TOOLS = {"primes_below": primes_below, "digit_sum": digit_sum, "add_up": add_up}
Message = dict[str, Any]


@task
def model(messages: list[Message]) -> Message:
    """Return the next message: calls of tools, which may run side by side, or the answer."""
    question, *rest = messages
    limit, wanted = map(int, re.findall(r"\d+", question["content"])[:2])
    if not rest:
        return {"calls": [{"tool": "primes_below", "inputs": {"limit": limit}}]}
    found = rest[1]["results"][0]
    if len(rest) == 2:
        return {"calls": [{"tool": "digit_sum", "inputs": {"number": number}} for number in found]}
    chosen = [number for number, total in zip(found, rest[3]["results"], strict=True) if total == wanted]
    if len(rest) == 4:
        return {"calls": [{"tool": "add_up", "inputs": {"numbers": chosen}}]}
    return {"answer": f"{', '.join(map(str, chosen))}; their sum is {rest[5]['results'][0]}"}


@task
def agent(question: str) -> str:
    """Let the model and its tools take turns; ask a person before the answer leaves."""
    messages: list[Message] = [{"content": question}]
    while True:
        said = context.call(model, {"messages": messages}).result()
        if "answer" in said:
            break
        context.emit(f"calls {len(said['calls'])} x {said['calls'][0]['tool']}")
        # All calls of a turn run side by side; this task holds no CPU while it waits for them.
        calls = [context.call(TOOLS[call["tool"]], call["inputs"]) for call in said["calls"]]
        messages += [said, {"results": [call.result() for call in calls]}]
    context.emit(f"asks for approval of: {said['answer']}")
    approval = context.wait_for(SIGNAL)
    return str(said["answer"]) if approval["ok"] else f"not approved: {approval['why']}"


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--refuse"]
    with LatticeClient() as client:
        workflow = client.create_workflow("agent loop")
        running = workflow.add_task(agent, {"question": " ".join(arguments) or QUESTION})
        run = workflow.run()
        for step in run.stream(running):
            print(f"- {step}")
            if step.startswith("asks"):  # A person would use `lattice runs signal`, or a page with a button.
                run.signal(SIGNAL, {"ok": "--refuse" not in sys.argv, "why": "a person said no"})
        print(run.result()["result"])


if __name__ == "__main__":
    main()
