"""Routing of tokens to experts: who goes where, with what weight, and the losses that keep experts busy.

Choosing is local: a token's experts follow from its logits. Three things belong to the batch as a whole, which lies on
all ranks, the tokens of rank r before those of r + 1: how many tokens an expert may have (capacity), the balance loss
(Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961) and the z-loss (Zoph et al. 2022,
arXiv:2202.08906). All three rest on sums of whole numbers, of which every rank sends its own to every other once, so
they have the same bits however the tokens are cut over ranks. Probabilities enter in units of 2^-40.

Of CuPy logits the kernels of a device make experts, weights and sums. What follows from them is decided on the host,
which waits once for these three.
"""

from __future__ import annotations

import operator
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from fivedp.comm.grid import grid_of
from fivedp.comm.mesh import Mesh
from fivedp.errors import DTypeError, LayoutError, ShapeError
from fivedp.kernels import routing as kernel
from fivedp.kernels._select import gemm_backend, is_cupy, library_of, sum_type
from fivedp.kernels.device_copies import to_device, to_host
from fivedp.kernels.gemm import gemm
from fivedp.kernels.routing import UNITS, Integers, Routed, Rule, Totals
from fivedp.ops.arguments import checked, same_kind
from fivedp.ops.batch_ranks import BatchRanks
from fivedp.ops.capacity import capacity_of, keep_highest, pairs_before, slots_of
from fivedp.ops.matmul import share_cores
from fivedp.ops.routing_call import Options, check_arrays, read_options

Array = Any
_SAVED = ("experts", "weights", "counts", "aux_loss", "z_loss", "dropped", "n_experts", "first_token")


@dataclass(frozen=True, eq=False)
class RoutingState:
    """What the gradient of a routing needs: the logits themselves (not a copy) and what was made of them.

    `chosen` are the experts before any were dropped, `balance` the derivative of the balance loss by the probabilities
    of a token.
    """

    logits: Array
    rule: Rule
    chosen: npt.NDArray[np.int32]
    log_sum: Array
    balance: npt.NDArray[np.float64]
    tokens_in_scope: int


@dataclass(frozen=True, eq=False)
class Routing:
    """Which experts the tokens of this rank go to.

    Attributes
    ----------
    experts : int32 (T_local, k)
        The best first; -1 where the pair was dropped, or where a slot is empty. CuPy's for CuPy logits.
    weights : (T_local, k)
        float32, float64 for float64 logits; 0 where `experts` is -1. CuPy's for CuPy logits.
    counts : int64 (E,)
        This rank's kept pairs of every expert.
    aux_loss, z_loss : float
        Of the whole batch, the same on every rank (of this rank's tokens by a local definition).
    dropped : int64
        How many of this rank's pairs were dropped.
    n_experts : int
    first_token : int
        The number of this rank's first token in the batch.
    state : RoutingState or None
        For the gradient; None where the routing was loaded or generated.
    """

    experts: npt.NDArray[np.int32]
    weights: Array
    counts: Integers
    aux_loss: float
    z_loss: float
    dropped: np.int64
    n_experts: int
    first_token: int = 0
    state: RoutingState | None = None
    _made_on_host: Routing | None = field(default=None, init=False, repr=False)

    def save(self, path: str | Path) -> None:
        """Write the routing of this rank's tokens to a file (npz); without what the gradient needs."""
        host = self.on_host()
        with open(path, "wb") as file:
            arrays: dict[str, Any] = {name: np.asarray(getattr(host, name)) for name in _SAVED}
            np.savez(file, **arrays)

    def on_host(self, *, just_made: bool = False) -> Routing:
        """The same with NumPy arrays: itself, or a copy of CuPy's, without what the gradient needs.

        Copies of `just_made` arrays are there. Else the host waits for the current stream to come here, for who has a
        routing may have written to its arrays.
        """
        if not is_cupy(self.experts) and not is_cupy(self.weights):
            return self
        if just_made and self._made_on_host is not None:
            return self._made_on_host
        experts, weights = to_host(self.experts, self.weights)
        return replace(self, experts=experts, weights=weights, state=None)

    @staticmethod
    def load(path: str | Path) -> Routing:
        """A routing that was saved.

        Raises
        ------
        LayoutError
            Where the file holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                saved = {name: file[name] for name in _SAVED}
        except (KeyError, ValueError) as error:
            raise LayoutError(f"Routing.load: {path} holds no routing ({error})") from None
        scalars = {name: saved[name].item() for name in _SAVED if saved[name].ndim == 0}
        return Routing(**(saved | scalars | {"dropped": np.int64(scalars["dropped"])}))


def route(
    logits: Array,
    top_k: int = 2,
    *,
    score: str = "softmax",
    normalize: bool = True,
    capacity_factor: float | None = None,
    bias: Array | None = None,
    groups: tuple[int, int] | None = None,
    group_mask: str = "strict",
    scale: float = 1.0,
    drop: str = "position",
    definition: str = "global",
    choice: str = "token",
    comm: Mesh | MPI.Intracomm | None = None,
) -> Routing:
    """The experts of every token, their weights, and the losses.

    Parameters
    ----------
    logits : (T_local, E)
        NumPy's or CuPy's; float32, float64 or bfloat16; T_local may differ from rank to rank and be 0. The routing
        keeps the array for `route_backward`: don't change it in between.
    top_k : int
        Experts of a token.
    score : {"softmax", "sigmoid"}
        What becomes of the logits.
    normalize : bool
        Divide a token's weights by their sum (plus 1e-20 for sigmoids), before any pair is dropped.
    capacity_factor : float, optional
        An expert takes at most ceil(capacity_factor T top_k / E) tokens, T those of the whole batch; None for no limit.
    bias : (E,), optional
        Added to scores for the choice, not in the weights: see `update_bias`. The same on every rank, a NumPy array.
    groups : (n_groups, top_groups), optional
        Experts in groups of neighbours; those of a token come from the groups whose two best have the highest sum.
    group_mask : {"strict", "hf"}
        Experts of other groups can't be chosen; "hf" gives them the key 0 instead, as Hugging Face's DeepSeek-V3
        does, which is above a negative score + bias.
    scale : float
        Multiplies the weights.
    drop : {"position", "score"}
        Who stays where an expert has too many tokens: first choices before second ones, each in the order of tokens,
        or the highest weights, ties to the lower token.
    definition : {"global", "gshard", "megatron", "hf"}
        Capacity and losses are those of the whole batch; "gshard" balances first choices only. "megatron" and "hf"
        are those of this rank's tokens, the loss by Hugging Face's definition top_k times larger.
    choice : {"token", "expert"}
        "expert": every expert takes the tokens with its highest scores, as many as its capacity (factor 1 where it is
        None). Then k is the largest number of experts that took a token of this rank.
    comm : Mesh or MPI.Intracomm, optional
        The ranks that hold the batch, of a mesh those along dp, sp and ep; None for this rank alone.

    Returns
    -------
    Routing

    Raises
    ------
    ShapeError, LayoutError, DTypeError
        On every rank, before any payload moves: arguments that won't do or differ between ranks, a logit that is not
        finite (with its row and rank).

    Notes
    -----
    Collective over `comm`. A rank sends (top_k + 1) E + 3 integers to every other; with drop="score" or
    choice="expert", for every digit of a score (4 for float32), 256 counts for each expert that has too many tokens.
    Equal scores go to the lower expert. Bits of all results depend neither on the number of ranks or threads nor on the
    instruction set.
    """
    keywords = {
        "top_k": top_k, "score": score, "normalize": normalize, "capacity_factor": capacity_factor, "bias": bias,
        "groups": groups, "group_mask": group_mask, "scale": scale, "drop": drop, "definition": definition,
        "choice": choice,
    }  # fmt: skip
    if comm is not None:
        share_cores(grid_of(comm))
    error: ValueError | None = None
    text = ""
    try:
        options = read_options(keywords)
        check_arrays(logits, options)
        text = options.text()
        try:
            local = _score(logits, options)
        except ValueError as found:
            raise LayoutError(f"route: {found}") from None
    except ValueError as found:
        error = found
    ranks = BatchRanks("route", comm, {"logits": logits}, text, error, free=True)
    scope = ranks.alone() if options.definition in ("megatron", "hf") else ranks
    tokens = sum(scope.lengths)
    if isinstance(local, Routed):
        routed, kept, of_batch = _tokens_choose(scope, options, local, tokens)
    else:
        routed, kept, of_batch = _experts_choose(scope, options, logits, local, tokens)
    aux_loss, z_loss, balance = _losses(options.definition, tokens, of_batch)
    tables = routed.on_host
    there, counts, dropped = [routed.experts, routed.weights], routed.totals.choices.sum(0), 0
    if kept is not tables[0]:
        tables, counts = (kept, np.where(kept >= 0, tables[1], 0)), _counts(kept, logits.shape[1])
        there, dropped = to_device(library_of(logits), tables), kept.size - int(counts.sum())
    routing = Routing(
        experts=there[0],
        weights=there[1],
        counts=counts,
        aux_loss=aux_loss,
        z_loss=z_loss,
        dropped=np.int64(dropped),
        n_experts=logits.shape[1],
        first_token=sum(ranks.lengths[: ranks.index]),
        state=RoutingState(logits, options.rule, routed.experts, routed.log_sum, balance, tokens),
    )
    if is_cupy(logits):
        host = replace(routing, experts=tables[0], weights=tables[1], state=None)
        object.__setattr__(routing, "_made_on_host", host)
    return routing


def router_logits(x: Array, router: Array) -> Array:
    """x router, (T, H) by (H, E), in the type of sums; each of the two in the type of tokens or of sums."""
    logits = library_of(x).empty((len(x), router.shape[1]), sum_type(x.dtype))
    # CuPy's own product would round the logits to the type of its factors.
    widened = x.dtype != router.dtype or (is_cupy(x) and gemm_backend() != "canonical")
    left, right = (a.astype(logits.dtype, copy=False) if widened else a for a in (x, router))
    gemm(left, right, logits)
    return logits


def route_backward(dweights: Array, routing: Routing, *, d_aux_loss: float = 0.0, d_z_loss: float = 0.0) -> Array:
    """The gradient of the logits.

    Parameters
    ----------
    dweights : (T_local, k)
        The gradient of `routing.weights`; of a dropped pair it is not read.
    routing : Routing
        As `route` returned it.
    d_aux_loss, d_z_loss : float
        The gradient of the two losses, which are one number for all ranks: give the same on each.

    Returns
    -------
    dlogits : (T_local, E)
        Of the logits' type. Local: this rank's tokens alone contribute to it.

    Raises
    ------
    LayoutError, ShapeError, DTypeError
        A routing without state, dweights of another shape or kind.
    """
    state = routing.state
    if state is None:
        raise LayoutError("route_backward: `routing` was loaded or generated; expected one that `route` returned")
    dweights = dweights if is_cupy(dweights) else np.asarray(dweights)
    same_kind("route_backward", {"dweights": dweights, "logits": state.logits, "routing.experts": routing.experts})
    if dweights.shape != routing.experts.shape:
        raise ShapeError(
            f"route_backward: `dweights` has shape {dweights.shape}; expected that of the weights, "
            f"{routing.experts.shape}"
        )
    if dweights.dtype.kind != "f" and dweights.dtype.name != "bfloat16":
        raise DTypeError(f"route_backward: `dweights` has dtype {dweights.dtype}; expected floats")
    z_factor = 2.0 * d_z_loss / max(1, state.tokens_in_scope)
    balance = d_aux_loss * state.balance if d_aux_loss else None
    d_logits = kernel.backward(
        dweights, state.logits, state.rule, state.chosen, routing.experts, state.log_sum, balance, z_factor
    )
    return d_logits.astype(state.logits.dtype, copy=False)


def update_bias(
    bias: Array, counts: Array, *, rate: float = 1e-3, comm: Mesh | MPI.Intracomm | None = None
) -> npt.NDArray[Any]:
    """The bias of the next step, which draws tokens to idle experts without any loss (arXiv:2408.15664).

    Parameters
    ----------
    bias : (E,) float
        The same on every rank.
    counts : (E,) int
        This rank's pairs of every expert, as in `Routing.counts`.
    rate : float
        What is added to the bias of an expert with fewer pairs than the mean, and taken from one with more.
    comm : Mesh or MPI.Intracomm, optional
        Counts are summed over its ranks.

    Returns
    -------
    (E,)
        A new array of the bias's type, the same on every rank to the bit.

    Raises
    ------
    ShapeError, DTypeError, LayoutError
        On every rank.
    """
    arrays, error = checked(lambda: _bias_and_counts(bias, counts))
    bias, counts = arrays or (np.empty(0), np.empty(0, np.int64))
    text = f"rate={rate} bias=({bias.size} numbers, {zlib.crc32(np.ascontiguousarray(bias).tobytes()):x})"
    ranks = BatchRanks("update_bias", comm, {"bias": bias, "counts": counts}, text, error)
    total = ranks.gather(counts.astype(np.int64)).sum(0)
    return np.asarray(bias + bias.dtype.type(rate) * np.sign(total.sum() - len(total) * total).astype(bias.dtype))


def _bias_and_counts(bias: Array, counts: Array) -> tuple[Array, Array]:
    """Both as NumPy arrays, checked."""
    for name, array in (("bias", bias), ("counts", counts)):
        if is_cupy(array):
            raise DTypeError(f"update_bias: `{name}` is a CuPy array; expected a NumPy array, as Routing.counts is")
    bias, counts = np.asarray(bias), np.asarray(counts)
    if bias.ndim != 1 or bias.shape != counts.shape:
        raise ShapeError(f"update_bias: `bias` has shape {bias.shape} and `counts` {counts.shape}; expected (E,)")
    if bias.dtype not in (np.float32, np.float64) or counts.dtype.kind not in "iu":
        raise DTypeError(
            f"update_bias: `bias` has dtype {bias.dtype} and `counts` {counts.dtype}; expected floats and integers"
        )
    return bias, counts


def _score(logits: Array, options: Options) -> Routed | tuple[Array, Totals]:
    """What this rank can do alone: its tokens' experts, or where experts choose, the scores."""
    if options.choice == "expert":
        return kernel.scores(logits, options.rule)
    return kernel.forward(logits, options.top_k, options.rule)


def _tokens_choose(
    ranks: BatchRanks, options: Options, routed: Routed, tokens: int
) -> tuple[Routed, npt.NDArray[np.int32], Totals]:
    """(what was chosen, the experts that are kept, the sums over the batch)."""
    totals, (experts, weights) = routed.totals, routed.on_host
    shape = totals.choices.shape
    everyone = ranks.gather(np.concatenate([x.reshape(-1) for x in totals]))
    choices = everyone[:, : totals.choices.size].reshape(-1, *shape)
    sums = _total(everyone[:, totals.choices.size :])
    of_batch = Totals(choices.sum(0), sums[:-3], sums[-3:])
    if options.capacity_factor is None:
        return routed, experts, of_batch
    capacity = capacity_of(options.capacity_factor, tokens, options.top_k, shape[1])
    if options.drop == "position":
        kept = kernel.drop_by_position(experts, pairs_before(choices, ranks.index), capacity)
    else:
        stays = keep_highest(ranks, experts.reshape(-1), weights.reshape(-1), of_batch.choices.sum(0), capacity)
        kept = np.where(stays.reshape(experts.shape), experts, np.int32(-1))
    return routed, kept, of_batch


def _experts_choose(
    ranks: BatchRanks, options: Options, logits: Array, scored: tuple[Array, Totals], tokens: int
) -> tuple[Routed, npt.NDArray[np.int32], Totals]:
    """The same where every expert takes its best tokens."""
    (scores,), totals = to_host(scored[0]), scored[1]
    n_experts = logits.shape[1]
    capacity = min(tokens, capacity_of(options.capacity_factor or 1.0, tokens, options.top_k, n_experts))
    taken = np.ones(scores.shape, bool)
    if capacity < len(scores):
        # An expert's best on all ranks are among its best here.
        place = len(scores) - capacity
        taken = scores >= np.partition(scores, place, axis=0)[place]
    rows, experts = np.nonzero(taken)
    every = np.full(n_experts, tokens, np.int64)
    taken[rows, experts] = keep_highest(ranks, experts, scores[rows, experts], every, capacity)
    routed = kernel.weights(logits, slots_of(taken), options.rule)
    sums = _total(ranks.gather(np.concatenate([totals.probabilities, totals.squares])))
    return routed, routed.on_host[0], Totals(np.full((1, n_experts), capacity), sums[:-3], sums[-3:])


def _total(everyone: Integers) -> Any:
    """The sum over ranks, in Python's integers: each sum may fill 63 bits."""
    high, low = (everyone >> 32).sum(0), (everyone & 0xFFFFFFFF).sum(0)
    return high.astype(object) * 2**32 + low.astype(object)


def _losses(definition: str, tokens: int, totals: Totals) -> tuple[float, float, npt.NDArray[np.float64]]:
    """(balance loss, z-loss, derivative of the balance loss by a token's probabilities).

    E sum_e f_e P_e with P_e the mean probability and f_e the share of pairs (gshard: of first choices) that are
    expert e's; by Hugging Face's definition, pairs of e per token. The sum is exact and rounded once.
    """
    n_experts = len(totals.probabilities)
    if not tokens:
        return 0.0, 0.0, np.zeros(n_experts)
    pairs: list[int] = (totals.choices[0] if definition == "gshard" else totals.choices.sum(0)).tolist()
    divisor = tokens * (tokens if definition == "hf" else sum(pairs))
    aux_loss = n_experts * sum(map(operator.mul, pairs, totals.probabilities)) / (divisor * UNITS)
    whole, fraction, beyond = totals.squares
    z_loss = float("inf") if beyond else (whole * UNITS + fraction) / (tokens * UNITS)
    return aux_loss, z_loss, n_experts * np.array(pairs, np.float64) / divisor


def with_experts(routing: Routing, experts: npt.NDArray[np.int32]) -> Routing:
    """The routing with other experts in the same slots, weights and gradient as they were."""
    (there,) = to_device(library_of(routing.experts), [experts])
    return replace(routing, experts=there, counts=_counts(experts, routing.n_experts))


def _counts(experts: npt.NDArray[np.int32], n_experts: int) -> Integers:
    """How many pairs every expert has; -1 is none."""
    return np.bincount(experts.reshape(-1) + 1, minlength=n_experts + 1)[1:].astype(np.int64, copy=False)
