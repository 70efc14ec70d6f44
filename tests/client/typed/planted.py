"""Mistakes, one a function: type checkers find those whose line ends with `# found by both`, building finds all."""

from typing import Any, TypedDict

from lattice_client import LatticeWorkflow, task

Workflow = LatticeWorkflow


class Match(TypedDict):
    high: int
    low: int


@task(cpu=2, retries=1)
def count(text: str, word: str) -> int:
    return text.count(word)


@task
def total(counts: list[int]) -> int:
    return sum(counts)


@task
def limits(counts: list[int]) -> Match:
    return {"high": max(counts), "low": min(counts)}


def unknown_input(workflow: Workflow) -> Any:
    return workflow.add_task(count.bind(txt="a", word="b"))  # found by both


def missing_input(workflow: Workflow) -> Any:
    return workflow.add_task(count.bind(text="a"))  # found by both


def value_of_another_type(workflow: Workflow) -> Any:
    return workflow.add_task(count.bind(text=5, word="b"))  # found by both


def too_many_inputs(workflow: Workflow) -> Any:
    return workflow.add_task(count.bind("a", "b", "c"))  # found by both


def task_in_place_of_its_output(workflow: Workflow) -> Any:
    found = workflow.add_task(limits.bind([1]))
    workflow.add_task(total.bind(counts=found))  # found by both
    return workflow.run()


def unknown_option(workflow: Workflow) -> Any:
    return task(gpuu=1)(total.function)  # found by both


def unknown_change(workflow: Workflow) -> Any:
    return total.with_(retry=3)  # found by both


def option_of_another_type(workflow: Workflow) -> Any:
    return total.with_(cpu="2")  # found by both


def unknown_setting_of_a_run(workflow: Workflow) -> Any:
    workflow.add_task(total.bind([1]))
    return workflow.run(prioritty=3)  # found by both


def inputs_by_keyword(workflow: Workflow) -> Any:
    return workflow.add_task(total, counts=[1])  # found by both


def unknown_output(workflow: Workflow) -> Any:
    return workflow.add_task(limits.bind([1])).outputs["hihg"]


def output_of_another_type(workflow: Workflow) -> Any:
    found = workflow.add_task(count.bind("a", "b"))
    return workflow.add_task(total.bind(found.output))


def one_key_of_another_type(workflow: Workflow) -> Any:
    found = workflow.add_task(limits.bind([1]))
    return workflow.add_task(total.bind(found.outputs["high"]))


def output_of_another_workflow(workflow: Workflow) -> Any:
    other = workflow.client.create_workflow().add_task(limits.bind([1]))
    workflow.add_task(count.bind("a", other.outputs["high"]["word"]))
    return workflow.run()


def value_in_a_dict_of_another_type(workflow: Workflow) -> Any:
    return workflow.add_task(count, {"text": 5, "word": "b"})


MISTAKES = [
    unknown_input,
    missing_input,
    value_of_another_type,
    too_many_inputs,
    task_in_place_of_its_output,
    unknown_option,
    unknown_change,
    option_of_another_type,
    unknown_setting_of_a_run,
    inputs_by_keyword,
    unknown_output,
    output_of_another_type,
    one_key_of_another_type,
    output_of_another_workflow,
    value_in_a_dict_of_another_type,
]
