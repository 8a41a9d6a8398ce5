"""Whole blocks of published models, as Hugging Face transformers has them, against the layer: values and gradients.

Every rank runs the block on all tokens, in float32 and in float64; the layer, cut over the ranks, may be twice as far
from the block in float64 as the block in float32 is. Tokens whose choice of experts hangs on rounding are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import fivedp
from fivedp import SharedExperts
from mpi_experts import of_rank


def _version(package: str) -> int:
    """The first number of a package's version; 0 where it is not installed."""
    try:
        return int(metadata.version(package).partition(".")[0])
    except metadata.PackageNotFoundError:
        return 0


# Tests that are skipped one by one: a launch whose files have no test at all would be a failure.
MISSING = "torch" if find_spec("torch") is None else "" if _version("transformers") >= 5 else "transformers 5"
torch: Any = None if MISSING else import_module("torch")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} is not installed")
RANKS = (1, 2)
TOKENS, WIDTH, INNER = 60, 32, 20
ROUTED = {"hidden_size": WIDTH, "moe_intermediate_size": INNER, "num_experts_per_tok": 4}


@dataclass
class Model:
    """A model's block, and the layer's keywords that stand for it."""

    module: str
    config: str
    block: str
    sizes: dict[str, Any]
    keywords: dict[str, Any] = field(default_factory=dict)
    shared: str = ""
    """The block's shared experts, where it has any."""

    def build(self, rng: np.random.Generator) -> Any:
        """The block with random weights, in float64."""
        home = __import__(f"transformers.models.{self.module}", fromlist=[self.config])
        config = getattr(home, self.config)(**self.sizes, hidden_act="silu")
        config._experts_implementation = "eager"
        block = getattr(home, f"modeling_{self.module}").__dict__[self.block](config).double()
        with torch.no_grad():
            for weight in block.parameters():
                weight.copy_(torch.from_numpy(rng.standard_normal(weight.shape) * weight.shape[-1] ** -0.5))
            if "bias" in self.keywords:  # scores stay positive, for versions differ where they are not
                block.gate.e_score_correction_bias.copy_(torch.from_numpy(rng.uniform(0, 0.3, config.n_routed_experts)))
        return block


MODELS = {
    "Mixtral": Model(
        "mixtral", "MixtralConfig", "MixtralSparseMoeBlock",
        {"hidden_size": WIDTH, "intermediate_size": INNER, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "Qwen2-MoE": Model(
        "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock",
        ROUTED | {"num_experts": 12, "norm_topk_prob": False, "shared_expert_intermediate_size": 36},
        {"normalize": False}, "shared_expert",
    ),
    "Qwen3-MoE": Model(
        "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock",
        ROUTED | {"num_experts": 16, "norm_topk_prob": True},
    ),
    "DeepSeek-V3": Model(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE",
        ROUTED | {"n_routed_experts": 16, "n_shared_experts": 2, "n_group": 4, "topk_group": 2,
                  "routed_scaling_factor": 2.5, "norm_topk_prob": True},
        {"score": "sigmoid", "groups": (4, 2), "scale": 2.5, "bias": None}, "shared_experts",
    ),
}  # fmt: skip


def array(tensor: Any) -> Any:
    return tensor.detach().numpy()


def of_block(block: Any, shared: str, take: Any) -> dict[str, Any]:
    """The block's weights by the layer's names and shapes, or with another `take` their gradients."""
    gate_up, down = take(block.experts.gate_up_proj), take(block.experts.down_proj)
    found = {
        "router": take(block.gate.weight).T, "w_up": gate_up[:, INNER:].swapaxes(1, 2),
        "w_gate": gate_up[:, :INNER].swapaxes(1, 2), "w_down": down.swapaxes(1, 2),
    }  # fmt: skip
    if shared:
        mlp = getattr(block, shared)
        for name in ("up", "gate", "down"):
            found[f"shared.w_{name}"] = take(getattr(mlp, f"{name}_proj").weight).T
        if hasattr(block, f"{shared}_gate"):
            found["shared.router"] = take(getattr(block, f"{shared}_gate").weight).T
    return found


def run_block(block: Any, shared: str, x: Any, dy: Any) -> dict[str, Any]:
    """y and all gradients, of all tokens, in the block's type."""
    dtype = block.gate.weight.dtype
    tokens = torch.tensor(x[None], dtype=dtype, requires_grad=True)
    block.zero_grad()
    y = block(tokens)
    (y * torch.tensor(dy[None], dtype=dtype)).sum().backward()
    found = of_block(block, shared, lambda weight: array(weight.grad))
    return {"y": array(y)[0], "x": array(tokens.grad)[0]} | found


def choices(block: Any, x: Any) -> Any:
    """(T, k): the experts of every token, rising."""
    return np.sort(array(block.gate(torch.tensor(x[None], dtype=block.gate.weight.dtype))[2]).reshape(len(x), -1))


@pytest.mark.parametrize("name", MODELS)
def test_layer_is_the_block(comm: MPI.Intracomm, seed: int, name: str) -> None:
    model, rng = MODELS[name], np.random.default_rng(seed)
    block = model.build(rng)
    # In float32 from here on, for both.
    block = block.float().double()
    x, dy = (rng.standard_normal((TOKENS, WIDTH)).astype(np.float32) for _ in range(2))
    noise = 1e-4 * rng.standard_normal(x.shape)
    firm = (choices(block, x) == choices(block, x + noise)).all(axis=1)
    assert firm.mean() > 0.8
    x, dy = x[firm], dy[firm]
    exact = run_block(block, model.shared, x, dy)
    plain = run_block(block.float(), model.shared, x, dy)

    w = of_block(block, model.shared, array)
    keywords = dict(model.keywords)
    if "bias" in keywords:
        keywords["bias"] = array(block.gate.e_score_correction_bias).astype(np.float32)
    if model.shared:
        keywords["shared"] = SharedExperts(*(w.get(f"shared.{n}") for n in ("w_up", "w_gate", "w_down", "router")))
    experts, everyone = of_rank(w["router"].shape[1], comm), np.array_split(np.arange(len(x)), comm.size)
    mine = everyone[comm.rank]
    y, state = fivedp.expert_layer(
        x[mine], w["router"], *(w[n][experts] for n in ("w_up", "w_gate", "w_down")), comm,
        top_k=model.sizes["num_experts_per_tok"], keep=True, **keywords,
    )  # fmt: skip
    d = fivedp.expert_layer_backward(dy[mine], state)
    assert (np.sort(state.routing.experts) == choices(block, x)[mine]).all()
    found = {"y": y, "x": d.x, "router": d.router, "w_up": d.w_up, "w_gate": d.w_gate, "w_down": d.w_down}
    if d.shared is not None:
        found |= {f"shared.{n}": getattr(d.shared, n) for n in ("w_up", "w_gate", "w_down", "router")}
    parts = {"y": mine, "x": mine, "w_up": experts, "w_gate": experts, "w_down": experts}
    for what, right in exact.items():
        part = parts.get(what, slice(None))
        scale = abs(right).max()
        error, usual = abs(found[what] - right[part]).max(initial=0) / scale, abs(plain[what] - right).max() / scale
        # A few steps of rounding where the block happens to be exact.
        assert error <= 2 * usual + 4 * 2.0**-24, f"{what}: {error:.3g}, the block in float32 {usual:.3g}"
    assert set(exact) == {key for key, value in found.items() if value is not None}
