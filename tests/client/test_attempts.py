"""The history of a run: attempts with their times, the critical path, and the summaries by node and function."""

from lattice_client.cli.attempts import MIN_COMPARED
from tests.client.histories import FAILURE, Script, rows, timestamp


def test_history_has_the_wait_and_the_run_time_of_each_attempt() -> None:
    script = Script()
    script.ran("a", 2, 5, queued_s=1.5)
    script.ran("b", 5.25, 6, "a", queued_s=0.25)
    assert rows(script.history()) == [("a", 1, "succeeded", 1.5, 3), ("b", 1, "succeeded", 0.25, 0.75)]


def test_a_retry_is_queued_from_the_end_of_its_backoff() -> None:
    script = Script()
    script.task("a", queued_s=1)
    script.started(1, "a")
    script.event(3, "task_retrying", "a", attempt=1, failure=FAILURE, retry_time_s=1005.0)
    script.started(9, "a", 2, node="n2")
    script.succeeded(10, "a", 2)
    history = script.history()
    assert rows(history) == [("a", 1, "failed", 1, 2), ("a", 2, "succeeded", 4, 1)]
    assert history.attempts[0].failure == "USER_ERROR: ValueError: no date"
    assert [attempt.is_critical for attempt in history.attempts] == [True, True]
    assert [(use.node_id, use.failed) for use in history.nodes()] == [("n1", 1), ("n2", 0)]


def test_times_of_the_newest_attempt_are_those_of_its_worker() -> None:
    script = Script()
    task = script.task("a", queued_s=1, attempt=2, start_time=timestamp(1003), end_time=timestamp(1008))
    script.started(1, "a")
    script.event(2, "task_retrying", "a", attempt=1, failure=FAILURE, retry_time_s=1002.0)
    # Told together, after the end.
    script.started(9, "a", 2)
    script.succeeded(9, "a", 2)
    assert rows(script.history()) == [("a", 1, "failed", 1, 1), ("a", 2, "succeeded", 1, 5)]
    task.attempt = 3
    assert rows(script.history())[1][-1] == 0


def test_history_of_a_running_run_has_running_and_waiting_tasks_up_to_now() -> None:
    script = Script()
    script.ran("a", 0, 4)
    script.task("going", "a", queued_s=1)
    script.started(5, "going")
    script.task("starved", "a", state="queued")
    script.task("later", "starved", state="blocked")
    history = script.history(at_s=20)
    assert rows(history)[1:] == [("going", 1, "running", 1, 15), ("starved", 0, "queued", 16, 0)]
    assert history.path == ["a", "going"]
    assert history.attempts[2].start_s is None


def test_history_counts_up_to_the_newest_event_when_the_clock_here_is_behind() -> None:
    script = Script()
    script.task("a")
    script.started(50, "a")
    script.event(60, "task_log", "a", attempt=1, text="x", stream="stdout")
    assert rows(script.history(at_s=3)) == [("a", 1, "running", 0, 10)]


def test_history_of_an_ended_run_has_no_waiting_tasks() -> None:
    script = Script()
    script.ran("a", 0, 1)
    script.task("never", state="queued")
    assert [task_id for task_id, *_ in rows(script.history())] == ["a"]


def test_critical_path_follows_the_input_that_came_last() -> None:
    script = Script()
    script.ran("quick", 0, 1)
    script.ran("slow", 0, 7)
    script.ran("join", 7, 8, "quick", "slow")
    script.ran("aside", 1, 6, "quick")
    script.ran("last", 8, 9, "join", "aside")
    history = script.history()
    assert history.path == ["slow", "join", "last"]
    assert [a.task_id for a in history.on_path()] == history.path


def test_critical_path_leads_through_the_last_item_of_a_map() -> None:
    script = Script()
    script.ran("split", 0, 1)
    script.task("double", "split", item_count=3)
    for number, end_s in enumerate((2, 6, 3)):
        script.ran(f"double[{number}]", 1, end_s, parent="double")
    script.ran("total", 6, 7, "double")
    assert script.history().path == ["split", "double[1]", "total"]


def test_critical_path_leads_through_the_task_that_spawned() -> None:
    script = Script()
    script.ran("plan", 0, 4)
    script.ran("plan/search", 2, 8, parent="plan")
    assert script.history().path == ["plan", "plan/search"]


def test_critical_path_ends_when_a_server_sends_a_cyclic_graph() -> None:
    script = Script()
    script.ran("a", 0, 1, "b")
    script.ran("b", 1, 2, "a")
    assert script.history().path == ["a", "b"]


def test_a_node_is_slow_compared_with_the_run_times_of_the_same_functions_elsewhere() -> None:
    script = Script()
    for number in range(MIN_COMPARED):
        for node, seconds in (("n1", 1.0), ("n2", 1.0), ("bad", 4.0)):
            script.ran(f"f{node}{number}", number * 4, number * 4 + seconds, function="f", node=node)
    # A node that runs only long tasks is not slow.
    script.ran("train", 0, 50, node="n4")
    assert {use.node_id: use.slowdown for use in script.history().nodes()} == {
        "bad": 4.0,
        "n1": 0.4,
        "n2": 0.4,
        "n4": None,
    }


def test_short_functions_do_not_make_a_node_slow() -> None:
    script = Script()
    for number in range(MIN_COMPARED):
        for node, long_s, short_s in (("n1", 10.0, 0.001), ("n2", 10.0, 0.01)):
            script.ran(f"l{node}{number}", number * 10, number * 10 + long_s, function="long", node=node)
            script.ran(f"s{node}{number}", number * 10, number * 10 + short_s, function="short", node=node)
    assert all(use.slowdown is not None and 0.99 < use.slowdown < 1.01 for use in script.history().nodes())


def test_functions_are_summed_up_with_the_longest_in_all_first() -> None:
    script = Script()
    script.ran("a1", 1, 2, function="a", queued_s=1)
    script.ran("a2", 5, 9, function="a", queued_s=3)
    script.ran("b1", 0, 1, function="b")
    found = script.history().functions()
    assert [(use.function, use.attempts, use.failed) for use in found] == [("a", 2, 0), ("b", 1, 0)]
    assert (found[0].median_ran_s, found[0].max_ran_s) == (2.5, 4)
    assert (found[0].median_queued_s, found[0].max_queued_s) == (2, 3)


def test_history_ignores_ends_without_a_start() -> None:
    script = Script()
    script.task("taken over")
    script.event(1, "task_succeeded", "taken over", attempt=0)
    script.event(1, "task_cancelled", "never", attempt=0, failure=FAILURE)
    assert rows(script.history()) == []
    assert script.history().path == []
