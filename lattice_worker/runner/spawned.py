"""The `__main__` module of a process that a task starts with `multiprocessing`: a copy of the task's script.

Rule: standard library and cloudpickle only. It is run by `multiprocessing`, and imported nowhere.
"""

import os
from pathlib import Path

from lattice_worker.runner.invocation.functions import SCRIPT_VARIABLE, load_pickle

_script = load_pickle(Path(os.environ[SCRIPT_VARIABLE]).read_bytes()).main
globals().update({name: value for name, value in vars(_script).items() if not name.startswith("__")})
