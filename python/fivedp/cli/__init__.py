"""The `fivedp` command: start ranks, and find out why they do not start.

    main.py        the arguments
    mpi_library.py which MPI this Python loads, found without initialising it
    launcher.py    the mpirun that belongs to it, and the environment it needs
    run.py         `fivedp run`: becomes that mpirun, or watches over it
    processes.py   all descendants of a launch, found and ended
    probes.py      what `fivedp doctor` looks at: facts
    rules.py       what it concludes: one finding and one fix for each
    doctor.py      one screen, or JSON

Nothing here imports MPI into this process, so that a broken MPI cannot take its own diagnosis down.
"""

from __future__ import annotations

from fivedp.cli.main import main

__all__ = ["main"]
