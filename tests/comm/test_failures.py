"""A rank fails in the middle of a call: the others end within seconds, with its words.

Each case is a program of its own under mpirun, because it ends in a crash.
"""

from __future__ import annotations

import re

import pytest

from mpi_launcher import Finished, run_mpi

OPENING = """
import os, signal, sys, time
import numpy as np
from mpi4py import MPI
import fivedp
from fivedp.ops import execution, prepared
comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
a, b = np.ones((64, 8), np.float32), np.ones((8, 64), np.float32)
def multiply(**keywords):
    return fivedp.sharded_matmul(a, b, "m k/p, k/p n -> m n", comm, **keywords)
def say(text):
    sys.stdout.write(f"rank {rank}: {text}\\n")
    sys.stdout.flush()
def break_multiplication(how):
    # Inside the call: headers are agreed, the others already wait for this rank's partial sums.
    def broken(self, *arguments):
        how()
    execution._Run._multiply = broken
    prepared.Prepared._multiply = broken
if os.environ.get("FIRST_CALL") != "1":
    multiply()  # so that the call that fails is one that came before, on prepared requests
"""
CATCH = """
begin = time.monotonic()
try:
    multiply()
    say("no error")
except BaseException as error:
    say(f"caught {type(error).__name__} after {time.monotonic() - begin:.1f} s: {error}")
"""


def run(program: str, n_ranks: int = 3, *, catch: bool = True, timeout: float = 40.0, **env: str) -> Finished:
    done = run_mpi(n_ranks, OPENING + program + (CATCH if catch else "multiply()\n"), timeout=timeout, env=env)
    print(f"exit status {done.returncode} after {done.seconds:.1f} s, ended: {done.ended_because}\n{done.output}")
    assert not done.timed_out, done.output
    return done


def caught(done: Finished) -> dict[int, tuple[str, float, str]]:
    """What each rank caught: rank -> (type, seconds, text)."""
    found = re.findall(r"^rank (\d+): caught (\w+) after ([\d.]+) s: (.*)$", done.stdout, re.M)
    return {int(rank): (kind, float(seconds), text) for rank, kind, seconds, text in found}


# The way of a first call, with messages of its own, and that of the same call again, with prepared ones.
WAYS = pytest.mark.parametrize("first_call", ["1", "0"], ids=["first call", "prepared call"])


@WAYS
def test_uncaught_exception_ends_the_job_with_its_traceback(first_call: str) -> None:
    done = run(
        "def how():\n    raise RuntimeError('seeded fault')\nif rank == 1:\n    break_multiplication(how)\n",
        catch=False,
        FIRST_CALL=first_call,
    )
    assert done.returncode != 0
    assert "fivedp: rank 1 raised, the job ends" in done.stderr
    assert "RuntimeError: seeded fault" in done.stderr
    assert "in how" in done.stderr
    assert done.seconds < 15


def test_uncaught_exception_outside_a_call_ends_the_job() -> None:
    done = run("if rank == 2:\n    {}['seeded']\n", catch=False)
    assert done.returncode != 0
    assert "fivedp: rank 2 raised, the job ends" in done.stderr
    assert "KeyError: 'seeded'" in done.stderr
    assert done.seconds < 15


@WAYS
def test_exception_in_the_middle_reaches_the_others(first_call: str) -> None:
    done = run(
        "def how():\n    raise MemoryError('seeded fault')\nif rank == 1:\n    break_multiplication(how)\n" + CATCH,
        FIRST_CALL=first_call,
    )
    first = [line for line in done.stdout.splitlines() if "caught" in line]
    kinds = {int(line.split()[1][:-1]): line for line in first[::-1]}
    assert "caught MemoryError" in kinds[1] or "caught PeerError" in kinds[1]
    everything = "\n".join(first)
    assert everything.count("caught MemoryError") == 1
    for rank in (0, 2):
        mine = [line for line in first if line.startswith(f"rank {rank}:")]
        assert "PeerError" in mine[0], mine
        assert "rank 1: MemoryError: seeded fault" in mine[0], mine
        assert float(re.search(r"after ([\d.]+) s", mine[0])[1]) < 5  # type: ignore[index]
        # The second call does not hang, nor give a wrong result.
        assert "PeerError" in mine[1], mine
        assert "can't be used any more" in mine[1], mine


@pytest.mark.parametrize("kv_heads", [1, 2], ids=["keys travel", "queries travel"])
def test_exception_in_the_middle_of_a_ring_reaches_the_others(kv_heads: int) -> None:
    done = run(
        "from fivedp.kernels import attention\n"
        "x = np.ones((1, 300, 2, 8), np.float32)\n"
        f"k = x[:, :, :{kv_heads}]\n"
        "o, lse = fivedp.ring_attention(x, k, k, comm, layout='contiguous')\n"
        "def multiply():\n"
        "    return fivedp.ring_attention_backward(x, x, k, k, o, lse, comm, layout='contiguous')\n"
        "backward = attention.backward_blocks\n"
        "def broken(*arguments):\n"
        "    if broken.calls:\n        raise MemoryError('seeded fault')\n"
        "    broken.calls += 1\n    backward(*arguments)\n"
        "broken.calls = 0\n"
        "if rank == 1:\n    attention.backward_blocks = broken  # its own block still, then no more\n"
    )
    found = caught(done)
    assert found[1][0] == "MemoryError"
    for rank in (0, 2):  # they wait for what rank 1 owes to the gradients of what travels
        assert found[rank][0] == "PeerError"
        assert "rank 1: MemoryError: seeded fault" in found[rank][2]
        assert found[rank][1] < 5


@pytest.mark.parametrize("broken", ["expert_hidden", "grouped_matmul", "expert_hidden_backward", "grouped_outer"])
def test_exception_in_the_middle_of_an_expert_layer_reaches_the_others(broken: str) -> None:
    """Before the rows come home, and in the backward before the numbers of pairs do, and after."""
    done = run(
        "from fivedp.kernels import experts\n"
        "rng = np.random.default_rng(rank)\n"
        "x = rng.standard_normal((40, 8)).astype(np.float32)\n"
        "router = np.random.default_rng(9).standard_normal((8, 6)).astype(np.float32)\n"
        "up, down = np.ones((2, 8, 4), np.float32), np.ones((2, 4, 8), np.float32)\n"
        "def multiply():\n"
        "    y, state = fivedp.expert_layer(x, router, up, up, down, comm, top_k=3, keep=True)\n"
        "    return fivedp.expert_layer_backward(y, state)\n"
        "multiply()\n"
        "def broken(*arguments, **keywords):\n    raise MemoryError('seeded fault')\n"
        f"if rank == 1:\n    experts.{broken} = broken\n"
    )
    found = caught(done)
    assert found[1][0] == "MemoryError"
    for rank in (0, 2):
        assert found[rank][0] == "PeerError"
        assert "rank 1: MemoryError: seeded fault" in found[rank][2]
        assert found[rank][1] < 5


def test_memory_that_cannot_be_had_for_the_result() -> None:
    done = run(
        "from types import SimpleNamespace\n"
        "import fivedp.ops.matmul as matmul\n"
        "def empty(*arguments, **keywords):\n    raise MemoryError('seeded fault')\n"
        "if rank == 0:\n"
        "    for call in fivedp.comm.grid.grid_of(comm).calls.values():\n"
        "        call.xp = SimpleNamespace(empty=empty)\n"
    )
    found = caught(done)
    assert found[0][0] == "MemoryError"
    for rank in (1, 2):
        assert found[rank][0] == "PeerError"
        assert "rank 0: MemoryError: seeded fault" in found[rank][2]
        assert found[rank][1] < 5


def test_interrupt_while_computing_reaches_the_others() -> None:
    done = run(
        "def how():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(1)\n"
        "if rank == 0:\n    break_multiplication(how)\n"
    )
    found = caught(done)
    assert found[0][0] == "KeyboardInterrupt"
    for rank in (1, 2):
        assert found[rank][0] == "PeerError"
        assert "rank 0: KeyboardInterrupt" in found[rank][2]


@pytest.mark.parametrize("place", ["before the call", "inside the call"])
def test_rank_that_exits(place: str) -> None:
    leave = "how()" if place == "before the call" else "break_multiplication(how)"
    done = run(f"def how():\n    sys.exit(0)\nif rank == 2:\n    {leave}\n")
    found = caught(done)
    others = (0, 1)
    if place == "inside the call":
        # The exit passes through the call as an exception, and this program catches it.
        assert found[2][0] == "SystemExit"
        for rank in others:
            assert found[rank][0] == "PeerError"
            assert "rank 2: SystemExit" in found[rank][2]
    else:
        for rank in others:
            assert found[rank][0] == "PeerError", found
            assert "rank 2 exited while rank" in found[rank][2]
    assert all(found[rank][1] < 6 for rank in others), found


@WAYS
@pytest.mark.parametrize("end", ["os._exit(0)", "os._exit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_rank_that_dies(end: str, first_call: str) -> None:
    done = run(f"def how():\n    {end}\nif rank == 1:\n    break_multiplication(how)\n", FIRST_CALL=first_call)
    found = caught(done)
    # The launcher may end the others first; where it does not, they know.
    for rank, (kind, seconds, text) in found.items():
        assert kind == "PeerError", found
        assert "rank 1 died while rank" in text, found
        assert seconds < 6, f"rank {rank}: {found}"
    # Hydra may take a rank that ends with status 0 for a success and end the others without a word.
    assert found or done.returncode != 0 or end == "os._exit(0)"
    assert "no error" not in done.stdout
    assert done.seconds < 25


def test_ranks_of_a_broken_call_do_not_wait_for_ever_for_the_end_of_mpi() -> None:
    done = run(
        "import atexit\n"
        "def how():\n    raise ValueError('seeded fault')\n"
        "if rank == 1:\n    break_multiplication(how)\n    atexit.register(time.sleep, 200)\n",
        timeout=90,
    )
    found = caught(done)
    assert found[1][0] == "ValueError"
    assert found[0][0] == found[2][0] == "PeerError"
    assert done.returncode != 0
    assert done.seconds < 60


def test_silent_rank_is_named_at_the_deadline() -> None:
    done = run("if rank == 1:\n    time.sleep(6)\n", FIVEDP_TIMEOUT="2")
    found = caught(done)
    for rank in (0, 2):
        kind, seconds, text = found[rank]
        assert kind == "PeerError"
        assert "waited 2 s (FIVEDP_TIMEOUT) for rank 1" in text
        assert 1.9 < seconds < 5
    assert found[1][0] == "PeerError", found


def test_wrong_deadline_is_told() -> None:
    done = run("", FIVEDP_TIMEOUT="soon", catch=False)
    assert done.returncode != 0
    assert "FIVEDP_TIMEOUT is 'soon'; expected a positive number of seconds" in done.stderr


def test_slow_rank_is_waited_for() -> None:
    done = run("if rank == 1:\n    time.sleep(2)\n", FIVEDP_TIMEOUT="30")
    assert done.returncode == 0
    assert done.stdout.count("no error") == 3


def test_different_numbers_of_calls_end_the_job() -> None:
    done = run("if rank == 0:\n    say('left')\nelse:\n    multiply()\n    multiply()\n", catch=False)
    assert done.returncode != 0
    assert "rank 0 exited while rank" in done.stderr
    assert done.seconds < 25


def test_caught_failures_leave_a_clean_exit() -> None:
    done = run("def how():\n    raise ValueError('seeded fault')\nif rank == 1:\n    break_multiplication(how)\n")
    assert len(caught(done)) == 3
    assert done.seconds < 25
