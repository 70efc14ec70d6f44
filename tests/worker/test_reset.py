"""The state that a process restores between two tasks, when a module of the tasks has set it up."""

import subprocess
import sys

POLICY = """
import asyncio, warnings
from lattice_worker.runner.surroundings.reset import Baseline

warnings.simplefilter("ignore", DeprecationWarning)
asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
policy = asyncio.get_event_loop_policy()
baseline = Baseline()
for _ in range(2):
    policy.get_event_loop().run_until_complete(asyncio.sleep(0))
    asyncio.run(asyncio.sleep(0))
    asyncio.set_event_loop_policy(None)
    baseline.quiet()
    assert baseline.make_ready() == ""
    assert asyncio.get_event_loop_policy() is policy
"""


def test_the_event_loop_policy_of_a_module_is_kept_without_the_loop_of_a_task() -> None:
    subprocess.run([sys.executable, "-c", POLICY], check=True, timeout=60)
