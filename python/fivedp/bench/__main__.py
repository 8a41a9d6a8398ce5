"""`python -m fivedp.bench`: see `--help`.

Nothing is imported from MPI or NumPy before `settle` has cleaned the environment, for that may start the process again.
"""

from __future__ import annotations

import sys

from fivedp.bench.environment import settle

if __name__ == "__main__":
    settle()
    from fivedp.bench.program import main

    sys.exit(main())
