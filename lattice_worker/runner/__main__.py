"""The program of the zygote, which becomes a runner whenever it forks.

python .../runner/__main__.py SOCKET LIMIT [MODULE ...]
"""

import os
import sys

# User code finds modules as a script would: this folder is not one of its own.
sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(os.path.abspath(__file__))]

from lattice_worker.runner.zygote import main  # noqa: E402  # after the line above

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
