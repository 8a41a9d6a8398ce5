"""The routing of published models, written with torch, against the recipe that stands for it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

import fivedp

# Tests that are skipped one by one: a launch whose files have no test at all would be a failure.
torch: Any = import_module("torch") if find_spec("torch") else None
pytestmark = pytest.mark.skipif(torch is None, reason="torch is not installed")
RANKS = (1,)
TOKENS = 300


def logits_of(seed: int, experts: int, **keywords: Any) -> Any:
    """Logits of which no two of a token are so close that rounding could exchange them."""
    rows = np.tile(np.linspace(-2.5, 2.5, experts), (TOKENS, 1))
    return torch.tensor(np.random.default_rng(seed).permuted(rows, axis=1), requires_grad=True, **keywords)


def dense(experts: Any, weights: Any, n_experts: int) -> Any:
    """(T, E): the weight of every expert, whatever the order of slots."""
    result = np.zeros((len(experts), n_experts), weights.dtype)
    np.put_along_axis(result, experts, weights, axis=1)
    return result


def compare(z: Any, chosen: Any, weights: Any, routing: fivedp.Routing, losses: Any = 0.0, **d_losses: float) -> None:
    """Experts, weights and the gradient of a random sum of weights and of `losses` against torch's."""
    u = torch.tensor(np.random.default_rng(0).standard_normal(z.shape), dtype=z.dtype)
    ((weights * u.gather(1, chosen)).sum() + losses).backward()
    n_experts = z.shape[1]
    wanted = dense(chosen.numpy(), weights.detach().numpy(), n_experts)
    tolerance = 1e-12 if z.dtype == torch.float64 else 1e-5
    np.testing.assert_allclose(dense(routing.experts, routing.weights, n_experts), wanted, atol=tolerance)
    dweights = np.take_along_axis(u.numpy(), routing.experts.astype(np.int64), axis=1)
    found = fivedp.route_backward(dweights, routing, **d_losses)
    np.testing.assert_allclose(found, z.grad.numpy(), atol=100 * tolerance)


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize(("experts", "top_k", "normalize"), [(8, 2, True), (128, 8, True), (60, 4, False)])
def test_mixtral_and_qwen(seed: int, name: str, experts: int, top_k: int, normalize: bool) -> None:
    dtype = getattr(torch, name)
    z = logits_of(seed, experts, dtype=dtype)
    p = torch.softmax(z, dim=-1)
    weights, chosen = torch.topk(p, top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    # The balance loss of Hugging Face: mean over tokens of a one-hot (T, k, E), times the mean probability.
    mask = torch.nn.functional.one_hot(chosen, experts).to(dtype)
    aux_loss = (mask.mean(0) * p.mean(0)[None]).sum() * experts
    z_loss = (torch.logsumexp(z, dim=-1) ** 2).mean()
    routing = fivedp.route(z.detach().numpy(), top_k, normalize=normalize, definition="hf")
    assert routing.aux_loss == pytest.approx(aux_loss.item(), rel=1e-5)
    assert routing.z_loss == pytest.approx(z_loss.item(), rel=1e-5)
    compare(z, chosen, weights, routing, 0.01 * aux_loss + 0.002 * z_loss, d_aux_loss=0.01, d_z_loss=0.002)


@pytest.mark.parametrize("mask", ["hf", "strict"])
def test_deepseek_v3(seed: int, mask: str) -> None:
    n_experts, n_groups, top_groups, top_k, scale = 256, 8, 4, 8, 2.5
    z = logits_of(seed, n_experts, dtype=torch.float64)
    bias = torch.tensor(np.random.default_rng(seed + 1).uniform(-0.6, 0.2, n_experts))
    scores = z.sigmoid()
    with torch.no_grad():
        biased = scores + bias
        group_scores = biased.view(TOKENS, n_groups, -1).topk(2, dim=-1)[0].sum(dim=-1)
        groups = torch.zeros_like(group_scores).scatter_(1, group_scores.topk(top_groups, dim=-1)[1], 1).bool()
        reached = groups[..., None].expand(-1, -1, n_experts // n_groups).reshape(TOKENS, n_experts)
        chosen = biased.masked_fill(~reached, 0.0 if mask == "hf" else float("-inf")).topk(top_k, dim=-1)[1]
    weights = scores.gather(1, chosen)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * scale
    routing = fivedp.route(
        z.detach().numpy(), top_k, score="sigmoid", groups=(n_groups, top_groups), group_mask=mask, scale=scale,
        bias=bias.numpy(),
    )  # fmt: skip
    compare(z, chosen, weights, routing)


def test_megatron_losses_of_sigmoids(seed: int) -> None:
    z = logits_of(seed, 16, dtype=torch.float64)
    scores = torch.sigmoid(z)
    weights, chosen = torch.topk(scores, 4, dim=-1)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    shares = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    counts = torch.bincount(chosen.reshape(-1), minlength=16)
    aux_loss = (shares.sum(0) * counts).sum() * 16 / (TOKENS * TOKENS * 4)
    routing = fivedp.route(z.detach().numpy(), 4, score="sigmoid", definition="megatron")
    assert routing.aux_loss == pytest.approx(aux_loss.item(), rel=1e-9)
    compare(z, chosen, weights, routing, 3 * aux_loss, d_aux_loss=3.0)


def test_switch_and_gshard(seed: int) -> None:
    z = logits_of(seed, 10, dtype=torch.float64)
    p = torch.softmax(z, dim=-1)
    top, chosen = torch.topk(p, 2, dim=-1)
    first = torch.nn.functional.one_hot(chosen[:, 0], 10).double().mean(0)
    aux_loss = (first * p.mean(0)).sum() * 10
    switch = fivedp.route(z.detach().numpy(), 1, normalize=False)
    assert switch.aux_loss == pytest.approx(aux_loss.item(), rel=1e-9)
    np.testing.assert_allclose(switch.weights, top[:, :1].detach().numpy(), rtol=1e-13)
    gshard = fivedp.route(z.detach().numpy(), 2, definition="gshard")
    assert gshard.aux_loss == switch.aux_loss
    weights = top / top.sum(dim=-1, keepdim=True)
    compare(z, chosen, weights, gshard, 0.5 * aux_loss, d_aux_loss=0.5)
    # Dropping comes after: the weight of the pair that stays is what it was.
    limited = fivedp.route(z.detach().numpy(), 2, definition="gshard", capacity_factor=0.5)
    assert limited.dropped > 0
    kept = limited.experts >= 0
    np.testing.assert_array_equal(limited.weights[kept], gshard.weights[kept])
