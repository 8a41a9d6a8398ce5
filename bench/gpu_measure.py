"""Time the GPU's kernels beside their ceilings and peers; a table last.

    python bench/gpu_measure.py --json results.json
    FIVEDP_ATTENTION_KERNEL=sm90 python bench/gpu_measure.py --only attention
    FIVEDP_PRODUCT_KERNEL=sm90 python bench/gpu_measure.py --only product

Every case runs on fresh random inputs, alternates with its peer, is timed with events, and is the median of seven runs.
A case that can't run says why and does not stop the others. Whether results are right is for tests/gpu to say, which
bench/gpu_check.sh runs before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from fivedp.kernels import attention, experts
from fivedp.kernels.cuda import attention as cuda_attention
from fivedp.kernels.cuda import gemm as cuda_gemm
from fivedp.kernels.cuda import grouped as cuda_grouped
from fivedp.kernels.cuda import norms as norm_kernels

BF16 = np.dtype(ml_dtypes.bfloat16)
Array = Any


@dataclass
class Row:
    """One line of the table: a time, what it means, and what it is held against."""

    name: str
    milliseconds: float = float("nan")
    rate: float = float("nan")
    unit: str = ""
    ratio: float = float("nan")
    of: str = ""
    wanted: float = float("nan")
    error: str = ""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """As printed."""
        if self.error:
            return f"{self.name:44} {self.error}"
        verdict = ""
        if self.wanted == self.wanted:
            verdict = "reached" if self.ratio >= self.wanted else f"SHORT of {self.wanted}"
        return (
            f"{self.name:44} {self.milliseconds:9.3f} ms {self.rate:8.1f} {self.unit:8} "
            f"{self.ratio:5.2f} of {self.of} {verdict}"
        )


def timed(*calls: Callable[[], object], runs: int = 7) -> list[float]:
    """The median time of each call in milliseconds, in alternation, after one run of each to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(runs):
        for call, record in zip(calls, times, strict=True):
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record()
            call()
            end.record()
            end.synchronize()
            record.append(cupy.cuda.get_elapsed_time(begin, end))
    return [statistics.median(record) for record in times]


def normal(*shape: int, dtype: Any = BF16) -> Array:
    """Fresh random numbers."""
    return cupy.random.standard_normal(shape, dtype=np.float32).astype(dtype)


def copies() -> float:
    """Bytes read and written in a second by a copy on the device."""
    source = cupy.empty(1 << 30, np.uint8)
    target = cupy.empty_like(source)
    (time,) = timed(lambda: cupy.copyto(target, source))
    return 2 * source.nbytes / time * 1e3


def product(n: int) -> Row:
    """The product of n x n matrices, as sharded_matmul on one rank carries it out, beside CuPy's."""
    from fivedp.kernels.gemm import gemm

    a, b, ours, theirs = normal(n, n), normal(n, n), cupy.empty((n, n), BF16), cupy.empty((n, n), BF16)
    mine, peer = timed(lambda: gemm([a], [b], ours), lambda: cupy.matmul(a, b, out=theirs))
    return Row(f"product bf16 {n}^3", mine, 2 * n**3 / mine / 1e9, "TFLOP/s", peer / mine, "cupy.matmul", 0.97)


def canonical(n: int) -> Row:
    """The product of n x n matrices in the canonical order of K, beside CuPy's."""
    a, b, ours, theirs = normal(n, n), normal(n, n), cupy.empty((n, n), BF16), cupy.empty((n, n), BF16)
    ran = cuda_gemm.gemm(a, b, ours)
    mine, peer = timed(lambda: cuda_gemm.gemm(a, b, ours), lambda: cupy.matmul(a, b, out=theirs))
    name = f"product canonical bf16 {ran} {n}^3"
    return Row(name, mine, 2 * n**3 / mine / 1e9, "TFLOP/s", peer / mine, "cupy.matmul")


def attentions(length: int, causal: bool, backward: bool, size: int = 128, v_size: int = 128) -> Row:
    """One layer of 16 heads, beside torch's fused attention where torch is installed and has it for this size."""
    batch, heads = max(1, 16384 // length), 16
    q, k, v, d_out = (normal(batch, length, heads, columns) for columns in (size, size, v_size, v_size))
    place = np.arange(length, dtype=np.int32)
    mask = attention.Mask(place, place, scale=size**-0.5, causal=causal)
    state = attention.empty_state(q, v_size)
    out = cupy.empty_like(v)
    ran = cuda_attention.forward(q, k, v, mask, state)
    lse = attention.finish(state, out)
    gradients = [cupy.zeros(x.shape, np.float32) for x in (q, k, v)]
    if backward:
        ran = cuda_attention.backward(d_out, q, k, v, mask, lse, cuda_attention.delta(d_out, out), *gradients)

    def forward() -> None:
        fresh = attention.empty_state(q, v_size)
        attention.forward(q, k, v, mask, fresh)
        attention.finish(fresh, out)

    def back() -> None:
        attention.backward(d_out, q, k, v, mask, lse, attention.delta(d_out, out), *gradients)

    columns = 3 * size + 2 * v_size if backward else size + v_size
    flops = 2 * batch * heads * length**2 * columns * (0.5 if causal else 1)
    which = "backward" if backward else "forward"
    name = f"attention bf16 {which} {ran} S={length} {'causal' if causal else 'full'}"
    name += "" if size == v_size == 128 else f" D={size}/{v_size}"
    wanted = 0.5 if backward else 0.6
    try:
        peer = _torch_attention(q, k, v, d_out, causal, backward)
        peer()
    except (ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and size == v_size == 128:
            raise
        (mine,) = timed(back if backward else forward)
        why = "is not installed" if isinstance(error, ImportError) else "has none of this head size"
        return Row(name, mine, flops / mine / 1e9, "TFLOP/s", of=f"torch, which {why}")
    mine, theirs = timed(back if backward else forward, peer)
    return Row(name, mine, flops / mine / 1e9, "TFLOP/s", theirs / mine, "torch's cuDNN SDPA", wanted)


def _torch_attention(q: Array, k: Array, v: Array, d_out: Array, causal: bool, backward: bool) -> Callable[[], object]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def shared(x: Array) -> Any:
        bits = torch.as_tensor(x.view(np.uint16).view(np.int16), device="cuda")
        return bits.view(torch.bfloat16).transpose(1, 2).contiguous().requires_grad_(backward)

    tensors = [shared(x) for x in (q, k, v)]
    gradient = shared(d_out).detach()
    stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr)

    def run() -> Any:
        with torch.cuda.stream(stream), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal)

    if not backward:
        return run
    made = run()

    def back() -> None:
        with torch.cuda.stream(stream):
            torch.autograd.grad(made, tensors, gradient, retain_graph=True)

    return back


def rows_of_experts(tokens: int, top_k: int, width: int, n_experts: int, copied: float) -> list[Row]:
    """Tokens to their experts' order and back, in bytes a second against a copy."""
    rng = np.random.default_rng()
    chosen = np.sort(np.argsort(rng.random((tokens, n_experts)), axis=1)[:, :top_k], axis=1).astype(np.int32)
    order = np.argsort(chosen.reshape(-1), kind="stable")
    token = (order // top_k).astype(np.int32)
    x, out = normal(tokens, width), cupy.empty((tokens * top_k, width), BF16)
    rows = experts.Rows([x], np.zeros(len(token), np.int32), token)
    (time,) = timed(lambda: experts.gather_rows(rows, out))
    moved = (x.nbytes + out.nbytes) / time * 1e3
    shape = f"T={tokens} k={top_k} H={width}"
    result = [Row(f"permute {shape}", time, moved / 1e9, "GB/s", moved / copied, "a copy", 0.85)]
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order))
    y = cupy.empty((tokens, width), BF16)
    weights = cupy.asarray(rng.random(tokens * top_k, np.float32))
    starts = cupy.arange(tokens + 1, dtype=np.int64) * top_k
    back = experts.Rows([out], np.zeros(len(place), np.int32), place)
    ids = cupy.asarray(chosen.reshape(-1))
    (time,) = timed(lambda: experts.combine_rows(back, starts, weights, ids, n_experts, y))
    moved = (out.nbytes + y.nbytes) / time * 1e3
    result.append(Row(f"unpermute {shape}", time, moved / 1e9, "GB/s", moved / copied, "a copy", 0.85))
    return result


def grouped(rows: int, n_experts: int, width: int, hidden: int) -> list[Row]:
    """A product of all experts and the gradient of its weights beside cuBLAS, expert by expert, on the same rows."""
    offsets = np.linspace(0, rows, n_experts + 1).astype(np.int64)
    groups, on_device = list(pairwise(offsets)), cupy.asarray(offsets)
    x, w, out = normal(rows, width), normal(n_experts, width, hidden), cupy.empty((rows, hidden), BF16)
    theirs, their_w, d_w = cupy.empty_like(out), cupy.empty_like(w), cupy.empty_like(w)

    def peer() -> None:
        for expert, (begin, end) in enumerate(groups):
            cupy.matmul(x[begin:end], w[expert], out=theirs[begin:end])

    def outer_peer() -> None:
        for expert, (begin, end) in enumerate(groups):
            cupy.matmul(x[begin:end].T, out[begin:end], out=their_w[expert])

    result = []
    for name, mine, other in (
        ("grouped", lambda: cuda_grouped.grouped_matmul(x, w, on_device, out), peer),
        ("grouped outer", lambda: cuda_grouped.grouped_outer(x, out, on_device, d_w), outer_peer),
    ):
        ran = mine()
        time, peer_time = timed(mine, other)
        flops = 2 * rows * width * hidden
        result.append(Row(f"{name} {ran} R={rows} E={n_experts} K={width} N={hidden}", time, flops / time / 1e9,
                          "TFLOP/s", peer_time / time, "cuBLAS a group", 0.8))  # fmt: skip
    return result


def norms(rows: int, columns: int, copied: float) -> Row:
    """RMSNorm in bytes a second against a copy."""
    x, gain, y = normal(rows, columns), normal(columns), cupy.empty((rows, columns), BF16)
    (time,) = timed(lambda: norm_kernels.rms_norm(x, gain, y))
    moved = 2 * x.nbytes / time * 1e3
    return Row(f"rms_norm bf16 {rows} x {columns}", time, moved / 1e9, "GB/s", moved / copied, "a copy", 0.85)


def main() -> int:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows")
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    options = parser.parse_args()
    copied = copies()
    rows = [Row("copy on the device, read + written", rate=copied / 1e9, unit="GB/s", of="")]

    def case(name: str, work: Callable[[], Row | list[Row]]) -> None:
        if not name.startswith(options.only):
            return
        try:
            found = work()
        except Exception as error:
            found = Row(name, error=f"{type(error).__name__}: {error}")
        rows.extend(found if isinstance(found, list) else [found])
        print(rows[-1].text(), file=sys.stderr, flush=True)

    case("product", lambda: product(8192))
    case("product canonical", lambda: canonical(8192))
    for length in (8192, 16384):
        for causal in (True, False):
            for backward in (False, True):
                name = f"attention {'backward' if backward else 'forward'} {length}"
                case(name, lambda s=length, c=causal, b=backward: attentions(s, c, b))
    for size, v_size in ((192, 128), (256, 256)):
        for backward in (False, True):
            name = f"attention {'backward' if backward else 'forward'} {size}/{v_size}"
            case(name, lambda b=backward, d=size, e=v_size: attentions(8192, True, b, d, e))
    case("rows of experts", lambda: rows_of_experts(4096, 2, 4096, 8, copied))
    case("rows of experts", lambda: rows_of_experts(32768, 8, 2048, 128, copied))
    case("product grouped", lambda: grouped(32768, 8, 4096, 14336))
    case("product grouped", lambda: grouped(32768, 128, 2048, 768))
    case("norm", lambda: norms(16384, 4096, copied))
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    if options.json:
        options.json.write_text(json.dumps({"device": device, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(device)
    for row in rows:
        print(row.text())
    return int(any(row.error for row in rows))


if __name__ == "__main__":
    sys.exit(main())
