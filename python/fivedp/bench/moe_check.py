"""Is this mixture of experts right? Sampled tokens and hidden units against float64, and sums that gradients conserve.

*Tokens*: some of every rank's tokens are routed again and sent through their experts, in float64 (long double for
float64 itself) and plainly, in the type of the inputs with what the layer stores rounded as it stores it. The owner of
an expert holds its weights, so each owner computes its pairs and all add what they have; a dense mixture would compute
every expert for every token and multiply most of them by zero. The gradient of a token is judged in two parts: its
first features are those that the router reads. *Hidden units*: the gradients of an expert's weights need all of its
tokens, but for one hidden unit only a column of each matrix. An error is wrong beyond twice the plain one, or twice
what sums taken term by term have: a BLAS adds some shapes in blocks, with a smaller error. *Conservation*: a layer is
linear in w_down, and in w_up with a gate or relu, so <w_down, d w_down> = <w_up, d w_up> for every expert, and over
all experts both are <dy, y>: every element of these gradients is read. Softmax does not change where all logits rise
together, so the rows of the router's gradient sum to zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fivedp.bench import agree, expert_workload, operands
from fivedp.bench.check import FEW, FREIVALDS_SIGMAS, SLACK, epsilon, pick, squares
from fivedp.bench.mixture import Indices, Inputs, Weights, choice_weights, logit_gradients, through
from fivedp.bench.pieces import span
from fivedp.bench.sampled_check import SampledCheck

Array = NDArray[Any]
SAMPLED_TOKENS, SAMPLED_UNITS, SAMPLED_EXPERTS = 24, 8, 2


class Check(SampledCheck):
    """Errors of one case on this rank, added up over all ranks when they are read.

    Parameters
    ----------
    tokens, experts : range
        This rank's.
    weights : Weights
        Of this rank's experts.
    """

    reason = "what rounding explains"

    def __init__(self, comm: Any, inputs: Inputs, tokens: range, experts: range, weights: Weights) -> None:
        super().__init__(comm, operands.dtype_of(inputs.case.dtype))
        self.inputs, self.case = inputs, inputs.case
        self.tokens, self.experts, self.weights = tokens, experts, weights
        self.draw = np.random.default_rng([inputs.seed, comm.rank])
        self._cancelled = 1.0  # how many times the gradients of the logits those numbers are whose differences they are

    def _sample(self) -> Indices:
        """The sampled tokens, some of every rank's share; the same on every rank."""
        ranks, draw = self.comm.size, np.random.default_rng([self.inputs.seed, 11])
        most = max(2, (6 if self.extended else SAMPLED_TOKENS) // ranks)
        shares = (span(self.case.tokens, ranks, rank) for rank in range(ranks))
        return np.concatenate([share.start + pick(len(share), most, draw) for share in shares]).astype(np.int64)

    def _pairs(self, tokens: Indices, chosen: Array, backward: bool) -> list[tuple[Array, Array, Array]]:
        """Exact and plain, of every pair (n, k, H): the expert's row, or its part of dx; and <dy, row> (n, k).

        Each owner computes its own; the others have zeros, so sums over the ranks are exact.
        """
        m, (n, k) = self.case.model, chosen.shape
        # wide numbers as a float64 and the rest, so that long double passes through a sum of float64
        rows, dots = np.zeros((2, 2, n, k, m.width)), np.zeros((2, 2, n, k))
        x = self.inputs.tokens("x", tokens)
        dy = self.inputs.tokens("dy", tokens) if backward else None
        logits = self.inputs.logits(tokens)
        mine = (chosen >= self.experts.start) & (chosen < self.experts.stop)
        for expert in np.unique(chosen[mine]).tolist():
            token, slot = np.nonzero(chosen == expert)
            weights = self.weights.of(expert - self.experts.start)
            for way, how in enumerate(self.ways):
                passed, down = through(x[token], weights, how), weights.down.astype(how.sums)
                if dy is None:
                    found, dot = passed.hidden @ down, np.zeros(len(token))
                else:
                    d_hidden = dy[token].astype(how.sums) @ down.T
                    dot = (d_hidden * passed.hidden).sum(axis=1)
                    share = choice_weights(logits[token].astype(how.sums), chosen[token], self.case)
                    d_hidden *= share[np.arange(len(token)), slot][:, None]
                    found = how.rounded(d_hidden * passed.d_up) @ weights.up.astype(how.sums).T
                    if weights.gate is not None:
                        found += how.rounded(d_hidden * passed.d_gate) @ weights.gate.astype(how.sums).T
                for place, value in ((rows, found), (dots, dot)):
                    place[way, 0][token, slot] = value
                    place[way, 1][token, slot] = value - place[way, 0][token, slot]
        agree.add_up(self.comm, rows)
        agree.add_up(self.comm, dots)
        return [
            (logits.astype(how.sums), rows[way, 0].astype(how.sums) + rows[way, 1].astype(how.sums),
             dots[way, 0].astype(how.sums) + dots[way, 1].astype(how.sums))
            for way, how in enumerate(self.ways)
        ]  # fmt: skip

    def _mine(self, tokens: Indices) -> NDArray[np.bool_]:
        mine: NDArray[np.bool_] = (tokens >= self.tokens.start) & (tokens < self.tokens.stop)
        return mine

    def forward(self, y: Array) -> None:
        """Judge y (T_local, H). Collective."""
        tokens = self._sample()
        chosen, answers = self.inputs.choices(tokens), []
        for how, (logits, rows, _) in zip(self.ways, self._pairs(tokens, chosen, False), strict=True):
            weights = choice_weights(logits, chosen, self.case)
            answers.append(how.rounded((weights[:, :, None] * rows).sum(axis=1)))
        mine = self._mine(tokens)
        self._add("y", y[tokens[mine] - self.tokens.start], *(a[mine] for a in answers))
        self._finish([y])

    def backward(self, dy: Array, y: Array, dx: Array, d_router: Array, gradients: Weights) -> None:
        """Judge the gradients: dx (T_local, H), d_router (H, E) and those of this rank's experts. Collective."""
        tokens = self._sample()
        chosen, answers = self.inputs.choices(tokens), []
        experts, scale = self.case.model.experts, expert_workload.factor(self.case.model.experts)
        for how, (logits, rows, dots) in zip(self.ways, self._pairs(tokens, chosen, True), strict=True):
            whole, d_logits = rows.sum(axis=1), logit_gradients(logits, chosen, dots, self.case)
            whole[:, :experts] += how.sums.type(scale) * d_logits
            answers.append(how.rounded(whole))
            if how is self.exact:
                minuends = squares(choice_weights(logits, chosen, self.case) * dots)
                self._cancelled = max(1.0, math.sqrt(minuends / (squares(d_logits) or math.inf)))
        mine = self._mine(tokens)
        got = dx[tokens[mine] - self.tokens.start]
        for name, part in (("dx, routed", slice(0, experts)), ("dx", slice(experts, None))):
            if part.start < dx.shape[1]:
                self._add(name, got[:, part], *(a[mine][:, part] for a in answers))
        counts, sampled = self._units(gradients)
        self._finish([dx, d_router, *(g for g in gradients if g is not None)])
        self._conserve(dy, y, d_router, gradients, counts, sampled)

    def _units(self, gradients: Weights) -> tuple[NDArray[np.int64], float]:
        """Judge the gradients of some hidden units; the tokens of every expert, and the mean of those judged."""
        case, names = self.case, ("d_w_gate", "d_w_up", "d_w_down")
        self._expect(*(name for name, gradient in zip(names, gradients, strict=True) if gradient is not None))
        chosen = self.inputs.choices(range(case.tokens))
        counts = np.bincount(chosen.ravel(), minlength=case.model.experts)
        # Those with tokens: the errors of the others, none, say nothing of how sums round.
        busy = np.flatnonzero(counts[self.experts.start : self.experts.stop])
        some = busy[pick(len(busy), 1 if self.extended else SAMPLED_EXPERTS, self.draw)[::-1]]
        units = pick(case.model.hidden, 2 if self.extended else SAMPLED_UNITS, self.draw).astype(np.int64)
        for local in some.tolist():
            token, slot = np.nonzero(chosen == self.experts.start + local)
            x, dy = (self.inputs.tokens(name, token) for name in ("x", "dy"))
            logits, weights = self.inputs.logits(token), self.weights.of(local).units(units)
            answers: list[Sequence[Array | None]] = []
            for how in self.ways:
                passed, wide = through(x, weights, how), dy.astype(how.sums, copy=False)
                share = choice_weights(logits.astype(how.sums), chosen[token], case)[np.arange(len(token)), slot, None]
                d_hidden = share * (wide @ weights.down.astype(how.sums).T)
                turned = x.astype(how.sums, copy=False).T
                d_gate = None if passed.d_gate is None else turned @ how.rounded(d_hidden * passed.d_gate)
                d_up = turned @ how.rounded(d_hidden * passed.d_up)
                d_down = how.rounded(share * passed.hidden).T @ wide
                answers.append([None if a is None else how.rounded(a) for a in (d_gate, d_up, d_down)])
            for name, got, truth, honest in zip(names, gradients.of(local).units(units), *answers, strict=True):
                if got is not None and truth is not None and honest is not None:
                    self._add(name, got, truth, honest)
        mine = counts[self.experts.start : self.experts.stop][some]
        total, number = agree.total(self.comm, float(mine.sum()), float(len(some)))
        return counts, total / max(1.0, number)

    def _conserve(
        self, dy: Array, y: Array, d_router: Array, gradients: Weights, counts: NDArray[np.int64], sampled: float
    ) -> None:
        """Judge the sums that every element of d_w_up, d_w_down and d_router is part of, after `_finish`."""
        m, spread = self.case.model, self._spread()
        wide = np.dtype(np.float64)
        worst, total = 0.0, np.zeros(3)
        for local, expert in enumerate(self.experts):
            one, other = (
                float(np.vdot(w.astype(wide), g.astype(wide)))
                for w, g in ((self.weights.down[local], gradients.down[local]),
                             (self.weights.up[local], gradients.up[local]))
            )  # fmt: skip
            # an element sums over the expert's tokens, and so do its errors
            more = math.sqrt(counts[expert] / max(1.0, sampled)) * math.sqrt(m.hidden * m.width)
            allowed = more * sum(
                spread[name] * math.sqrt(squares(w.astype(wide)) / max(1, w.size))
                for name, w in (("d_w_down", self.weights.down[local]), ("d_w_up", self.weights.up[local]))
            )
            worst = max(worst, _over(abs(one - other), FREIVALDS_SIGMAS * allowed + self._floor(one)))
            if counts[expert] == 0 and any(g is not None and g.astype(wide).any() for g in gradients.of(local)):
                worst = math.inf  # nothing but zeros has no error
            total += (one, allowed**2, 0.0)
        total[2] = float(np.vdot(dy.astype(wide), y.astype(wide)))
        agree.add_up(self.comm, total)
        # y is stored in the type of the inputs, whose rounding dy weighs at random
        rounding = epsilon(self.dtype) * math.sqrt(squares(dy.astype(wide)) * squares(y.astype(wide)) / max(1, y.size))
        (own,) = agree.total(self.comm, rounding**2)
        allowed = FREIVALDS_SIGMAS * math.sqrt(total[1] + own) + self._floor(total[0])
        worst = max(worst, _over(abs(total[0] - total[2]), allowed))
        if m.score == "softmax":
            sums = d_router.astype(wide)
            own = epsilon(self.dtype) * math.sqrt(squares(sums) * m.experts / max(1, sums.size))
            own = self._cancelled * (own + self._router_rounding(d_router))
            worst = max(worst, _over(float(np.abs(sums.sum(axis=1)).max(initial=0)), FREIVALDS_SIGMAS * own))
        (self._residual,) = agree.largest(self.comm, worst)

    def _router_rounding(self, d_router: Array) -> float:
        """What sums over all tokens in the type of sums lose of an element of d_router, about."""
        size = math.sqrt(squares(d_router.astype(np.float64)) / max(1, d_router.size))
        return epsilon(self.plain.sums) * math.sqrt(self.case.tokens * self.case.model.experts) * size

    def _floor(self, value: float) -> float:
        """The sums themselves round."""
        return epsilon(np.dtype(np.float64)) * self.case.pairs * self.case.model.hidden * (1.0 + abs(value))

    def _allowed(self, name: str, plainly: float, samples: float) -> float:
        model = self.case.model
        terms = model.width + model.hidden + (self.case.tokens if name.startswith("d_w") else 0)
        # A sum of n random terms, each partial sum rounded by half a unit at most: u sqrt(n / 6) of the whole.
        one_by_one = epsilon(self.plain.sums) / 2 * math.sqrt(terms / 6)
        allowed = SLACK * max(plainly, one_by_one)
        if min(samples, self.case.tokens) < FEW:
            # The samples of few tokens share few errors, in which either computation may be lucky.
            luck = epsilon(self.dtype) + FREIVALDS_SIGMAS * one_by_one
            allowed += luck * (self._cancelled if name == "dx, routed" else 1.0)
        return allowed


def _over(value: float, allowed: float) -> float:
    """How many times the allowed a value is; infinite where it is not a number."""
    ratio = value / allowed if allowed else (math.inf if value else 0.0)
    return ratio if math.isfinite(ratio) else math.inf
