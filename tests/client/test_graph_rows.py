"""The tree of a run's graph, and the groups of a large one."""

from lattice_client.cli.graph_rows import MAX_DEPTH, TreeRow, groups_of, tree_rows
from tests.client.histories import Script, chain, duration, timestamp


def tree(script: Script, *, is_grouped: bool = False) -> list[TreeRow]:
    tasks = {task.task_id: task for task in script.tasks}
    return [*tree_rows(groups_of(script.graph, tasks, is_grouped=is_grouped))]


def drawn(script: Script, *, is_grouped: bool = False) -> list[str]:
    return [f"{row.prefix}{row.name}" for row in tree(script, is_grouped=is_grouped)]


def test_a_task_stands_below_the_deepest_task_it_waits_for() -> None:
    script = Script()
    script.task("plan")
    script.task("search", "plan")
    script.task("read", "plan")
    script.task("summary", "search")
    script.task("answer", "read", "summary", "plan")
    script.task("other")
    found = tree(script)
    assert [f"{row.prefix}{row.name}" for row in found] == [
        "plan",
        "\u251c\u2500 search",
        "\u2502  \u2514\u2500 summary",
        "\u2502     \u2514\u2500 answer",
        "\u2514\u2500 read",
        "other",
    ]
    assert found[3].after == "plan, read"


def test_items_and_spawned_tasks_stand_below_their_parents() -> None:
    script = Script()
    script.task("split")
    script.task("double", "split", item_count=2)
    script.task("double[0]", parent="double")
    script.task("double[1]", parent="double")
    script.task("total", "double")
    assert drawn(script)[1:] == [
        "\u2514\u2500 double",
        "   \u251c\u2500 double[0]",
        "   \u251c\u2500 double[1]",
        "   \u2514\u2500 total",
    ]


def test_tasks_of_one_function_share_a_row_when_they_wait_for_the_same_groups() -> None:
    script = Script()
    for number in range(5):
        script.task(f"fetch{number}", function="fetch", state="succeeded")
        script.task(f"parse{number}", f"fetch{number}", function="parse", state="queued" if number else "succeeded")
    script.task("report", *(f"parse{number}" for number in range(5)))
    found = tree(script, is_grouped=True)
    assert [f"{row.prefix}{row.name}" for row in found] == [
        "fetch \u00d7 5",
        "\u2514\u2500 parse \u00d7 5",
        "   \u2514\u2500 report",
    ]
    assert found[1].state == "4 queued, 1 succeeded"


def test_a_chain_of_one_function_is_one_group() -> None:
    script = Script()
    names = chain(10_000)
    for before, name in zip(("", *names), names, strict=False):
        script.task(name, *filter(None, [before]), function="step")
    assert drawn(script, is_grouped=True) == ["step \u00d7 10,000"]


def test_a_deep_graph_is_drawn_without_further_indentation() -> None:
    script = Script()
    names = chain(3000)
    for before, name in zip(("", *names), names, strict=False):
        script.task(name, *filter(None, [before]))
    found = tree(script)
    assert [row.name for row in found] == names
    assert max(len(row.prefix) for row in found) <= 3 * (MAX_DEPTH + 1)


def test_ten_thousand_tasks_of_two_functions_are_three_rows() -> None:
    script = Script()
    for number in range(5000):
        script.task(f"a{number}", function="a")
        script.task(f"b{number}", f"a{number}", function="b")
    script.task("c", *(f"b{number}" for number in range(5000)))
    assert len(tree(script, is_grouped=True)) == 3


def test_tasks_are_drawn_when_a_task_is_defined_before_those_it_waits_for() -> None:
    script = Script()
    script.task("second", "first")
    script.task("first")
    assert drawn(script) == ["first", "\u2514\u2500 second"]


def test_tasks_are_drawn_when_a_server_sends_a_cyclic_graph_or_unknown_names() -> None:
    script = Script()
    script.task("a", "b", "nowhere")
    script.task("b", "a")
    assert {row.name for row in tree(script)} == {"a", "b"}


def test_a_row_has_the_times_of_its_tasks() -> None:
    script = Script()
    for number, seconds in enumerate((1, 2, 30)):
        task = script.task(f"f{number}", function="f", attempt=1 + number, node_id="n1", state="succeeded")
        task.start_time.CopyFrom(timestamp(0))
        task.end_time.CopyFrom(timestamp(seconds))
        task.queue_time.CopyFrom(duration(seconds / 10))
    (row,) = tree(script, is_grouped=True)
    assert (row.ran, row.queued, row.attempt, row.node) == ("2.0s max 30.0s", "200ms max 3.0s", "+3", "n1")
    single = tree(script)[2]
    assert (single.ran, single.queued, single.attempt, single.state) == ("30.0s", "3.0s", "3", "succeeded")
