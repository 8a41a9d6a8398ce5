"""Experts cut over two axes of a mesh: whole experts over ep, their hidden features over tp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp.errors import LayoutError, ShapeError
from fivedp.layout.shares import share

RANKS = (2, 4, 6)
TIMEOUT = 120

Array = Any
TOKENS, WIDTH, HIDDEN, EXPERTS = 61, 16, 23, 5


class Problem:
    """A whole layer, the same on every rank, and the shares of it."""

    def __init__(self, seed: int, gated: bool) -> None:
        rng = np.random.default_rng(seed)
        self.x, self.dy = rng.standard_normal((2, TOKENS, WIDTH))
        self.router = rng.standard_normal((WIDTH, EXPERTS))
        self.w_up, w_gate = rng.standard_normal((2, EXPERTS, WIDTH, HIDDEN))
        self.w_gate = w_gate if gated else None
        self.w_down = rng.standard_normal((EXPERTS, HIDDEN, WIDTH))

    def run(self, comm: Any, ep: tuple[int, int], tp: tuple[int, int], **keywords: Any) -> tuple[Array, Any, Any, Any]:
        """y, the gradients, the state, and where this rank's tokens, experts and hidden features are."""
        tokens, experts, features = (
            slice(*share(n, size, rank)) for n, (rank, size) in ((TOKENS, ep), (EXPERTS, ep), (HIDDEN, tp))
        )
        gate = None if self.w_gate is None else self.w_gate[experts, :, features]
        y, state = fivedp.expert_layer(
            self.x[tokens], self.router, self.w_up[experts, :, features], gate, self.w_down[experts, features], comm,
            top_k=2, activation="gelu" if gate is None else "swiglu", keep=True, **keywords,
        )  # fmt: skip
        gradients = fivedp.expert_layer_backward(self.dy[tokens], state, d_aux_loss=0.1, d_z_loss=0.01)
        return y, gradients, state, (tokens, experts, features)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_experts_cut_over_two_axes_give_what_whole_ones_give(
    comm: MPI.Intracomm, seed: int, gated: bool, capacity_factor: float | None
) -> None:
    problem = Problem(seed, gated)
    keywords = {"capacity_factor": capacity_factor}
    y, d, alone, _ = problem.run(MPI.COMM_SELF, (0, 1), (0, 1), **keywords)
    for tp in {2, comm.size}:
        mesh = fivedp.Mesh(comm, ep=comm.size // tp, tp=tp)
        ep_axis, tp_axis = mesh.axis("ep"), mesh.axis("tp")
        mine, found, state, (tokens, experts, features) = problem.run(
            mesh, (ep_axis.rank, ep_axis.size), (tp_axis.rank, tp_axis.size), tensor="tp", **keywords
        )
        pairs = [
            (mine, y[tokens]),
            (found.x, d.x[tokens]),
            (found.router, d.router),
            (found.weights, d.weights[tokens]),
        ]
        pairs += [(found.w_up, d.w_up[experts, :, features]), (found.w_down, d.w_down[experts, features])]
        if gated:
            pairs.append((found.w_gate, d.w_gate[experts, :, features]))
        for got, wanted in pairs:
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-11)
        # Ranks along tp hold the same tokens: they are one batch, counted once.
        assert state.routing.aux_loss == alone.routing.aux_loss
        assert np.array_equal(state.routing.experts, alone.routing.experts[tokens])
        # The same bits along tp.
        everyone = tp_axis.comm.allgather((mine.tobytes(), found.x.tobytes(), found.router.tobytes()))
        assert len(set(everyone)) == 1


def test_bits_do_not_depend_on_the_ranks_along_ep(comm: MPI.Intracomm, seed: int) -> None:
    problem = Problem(seed, gated=True)
    mesh = fivedp.Mesh(comm, ep=comm.size // 2, tp=2)
    ep_axis, tp_axis = mesh.axis("ep"), mesh.axis("tp")
    pair = fivedp.Mesh(tp_axis.comm, tp=2)
    y, d, _, _ = problem.run(pair, (0, 1), (tp_axis.rank, 2), tensor="tp")
    mine, found, _, (tokens, experts, _) = problem.run(
        mesh, (ep_axis.rank, ep_axis.size), (tp_axis.rank, 2), tensor="tp"
    )
    assert mine.tobytes() == y[tokens].tobytes()
    assert found.x.tobytes() == d.x[tokens].tobytes()
    assert found.w_up.tobytes() == d.w_up[experts].tobytes()
    assert found.w_down.tobytes() == d.w_down[experts].tobytes()


def test_wrong_arguments_raise_on_every_rank(comm: MPI.Intracomm, seed: int) -> None:
    problem = Problem(seed, gated=True)
    mesh = fivedp.Mesh(comm, ep=comm.size // 2, tp=2)
    ep, tp = ((mesh.axis(name).rank, mesh.axis(name).size) for name in ("ep", "tp"))
    with pytest.raises(LayoutError, match="tensor is 'ep'; expected one of the axes pp and tp"):
        problem.run(mesh, ep, tp, tensor="ep")
    with pytest.raises(LayoutError, match=r"tensor is 'tp' and the mesh a \w+; expected a fivedp.Mesh"):
        problem.run(comm, (comm.rank, comm.size), (0, 1), tensor="tp")
    whole = problem.x
    if comm.rank == comm.size - 1:
        problem.x = whole[:-1]  # a token less than its twin, or a share that is not
    with pytest.raises(ShapeError, match="along tp all ranks hold the same tokens"):
        problem.run(mesh, ep, tp, tensor="tp")
    problem.x = whole
    if comm.rank == 1:
        problem.w_down = problem.w_down[:, :, 1:]
    with pytest.raises(ShapeError, match=r"`w_down` has shape .* \(rank 1\)"):
        problem.run(mesh, ep, tp, tensor="tp")
