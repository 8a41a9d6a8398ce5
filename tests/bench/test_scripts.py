"""The scripts around the benchmark: tables are what the files say, pictures can be drawn, contests are fair."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from fivedp.kernels.attention import Mask
from fivedp.layout.sequence import place
from fivedp.reference import attention_reference
from mpi_launcher import run_mpi

BENCH = Path(__file__).resolve().parents[2] / "bench"
RESULTS = sorted((BENCH / "results").glob("*.json"))


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH / "peers"))
    for name in [n for n in os.environ if n.startswith("FIVEDP_BENCH_PYTHON_")]:
        monkeypatch.delenv(name)
    contest = load(BENCH / "peers" / "contest.py")
    for name in ("products", "attentions", "mixtures"):  # their errors are those of this copy of `contest`
        load(BENCH / "peers" / f"{name}.py")
    return contest


def product(m: int, n: int, k: int, dtype: str = "float32") -> Any:
    return sys.modules["products"].Product(m, n, k, dtype)


def attention(*sizes: Any, **options: Any) -> Any:
    return sys.modules["attentions"].Attention(*sizes, **options)


def mixture(*sizes: Any, **options: Any) -> Any:
    return sys.modules["mixtures"].Mixture(*sizes, **options)


def test_tables_of_the_documentation_are_what_the_results_say() -> None:
    tables = load(BENCH / "tables.py")
    text = tables.DOCUMENT.read_text()
    assert tables.PART.search(text), "no generated part was found"
    assert tables.generate(text) == text


def test_a_generated_part_is_written_anew_and_the_rest_is_kept(tmp_path: Path) -> None:
    tables = load(BENCH / "tables.py")
    aims = {"aims": [{"title": "speed", "measured": 2.0, "wanted": 3.0, "unit": "times", "more_is_better": True}]}
    (tmp_path / "r.json").write_text(json.dumps(aims))
    text = "before\n<!-- generated: aims r.json -->\nold\n<!-- end -->\nafter\n"
    new = tables.generate(text, tmp_path)
    assert new.startswith("before\n<!-- generated: aims r.json -->\n| figure |")
    assert new.endswith("<!-- end -->\nafter\n")
    assert "old" not in new
    assert "**2** times" in new
    assert "**short**" in new
    assert tables.generate(new, tmp_path) == new


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_a_kept_result_names_no_host_and_no_path(file: Path) -> None:
    text = file.read_text()
    assert json.loads(text)["schema"] == 1
    assert os.uname().nodename not in text
    assert not re.search(r'"[^"]*(/home|/root|/tmp|/usr|/work)', text)


def test_pictures_are_drawn_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = load(BENCH / "plot.py")
    drawn = 0
    for file in RESULTS:
        result = json.loads(file.read_text())
        kinds = {"fivedp.bench": ("share", "bytes", "ranks"), "fivedp.bench.peers": ("peers",)}.get(result["kind"], ())
        for kind in kinds:
            figure = plot.KINDS[kind]([result])
            figure.savefig(tmp_path / "x.svg")
            assert (tmp_path / "x.svg").stat().st_size > 1000
            plot.plt.close(figure)
            drawn += 1
    assert drawn or not RESULTS


def test_entries_of_a_contest_take_turns_and_are_checked(peers: Any) -> None:
    one, two = peers.Entry("numpy", 1, 1, wanted=0.1), peers.Entry("numpy", 1, 2, wanted=0.1)
    arena = peers.Arena(rounds=3)
    try:
        record = arena.hold(peers.Contest("two", product(65, 70, 75), (one, two)), seed=5)
        (ours, theirs) = record["entries"]
        assert len(ours["samples"]) == len(theirs["samples"]) == 3
        assert theirs["spread"][0] <= theirs["ratio"] <= theirs["spread"][1]
        assert record["missing"] == record["wrong"] == {}
        lines = "\n".join(peers.table(record))
        assert "wanted 0.10: reached" in lines or "SHORT" in lines
    finally:
        arena.close()


def test_a_wrong_peer_is_named_and_not_timed(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver expects the product of other inputs, as it would after a peer's mistake."""
    products = sys.modules["products"]
    right = products._expected
    monkeypatch.setattr(products, "_expected", lambda work, seed: right(work, seed + 2))
    arena = peers.Arena(rounds=1)
    try:
        contest = peers.Contest("one", product(40, 50, 60, "float64"), (peers.Entry("numpy", 1, 1),))
        record = arena.hold(contest, seed=5)
    finally:
        arena.close()
    assert record["entries"] == []
    assert "Freivalds" in record["wrong"]["numpy 1x1"]


def test_a_missing_program_is_named_with_its_installation(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = sys.modules["programs"]
    absent = programs.Program("heat_matmul.py", "mpirun", "no_such_module_anywhere", "pip install something")
    monkeypatch.setitem(programs.PROGRAMS, "heat", absent)
    arena = peers.Arena(rounds=1)
    record = arena.hold(peers.Contest("none", product(8, 8, 8), (peers.Entry("heat", 2, 1),)), seed=5)
    arena.close()
    assert "pip install something" in record["missing"]["heat 2x1"]


def test_every_suite_puts_fivedp_first_and_gives_all_the_same_cores(peers: Any) -> None:
    suites = load(BENCH / "peers" / "suites.py")
    for name in suites.NAMES:
        for contest in suites.suite(name, 2, 64):
            first, *others = contest.entries
            assert first.program in ("fivedp", "fivedp_attention", "fivedp_moe")
            assert others
            crowded = "ranks on" in contest.title
            # ours on another number of ranks says how well ranks add up, and is no peer
            cores = {e.ranks * e.threads for e in contest.entries if e is first or e.program != first.program}
            assert len(cores) == 1 or crowded, contest.title


def test_programs_start_without_what_misleads_a_blas(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "MKL_DEBUG_CPU_TYPE", "NVPL_BLAS_DEBUG_CPU_TYPE"):
        monkeypatch.setenv(name, "1")
    env = sys.modules["programs"].environment(3)
    assert not [n for n in env if n.startswith("NVPL_") or n in sys.modules["programs"].MISLEADING]
    assert env["OPENBLAS_NUM_THREADS"] == env["OMP_NUM_THREADS"] == "3"


def rows_by_definition(work: Any, seed: int) -> dict[str, Any]:
    """o, or dq, dk and dv, of all tokens and heads, from the library's float64 reference."""
    inputs = sys.modules["attention_peer"].inputs({**work.sizes, "dtype": work.dtype, "seed": seed},
                                                  np.arange(work.tokens))  # fmt: skip
    q, k, v, *do = (x[None].astype(np.float64) for x in inputs.values())
    where = place(np.arange(work.tokens), work.documents or None)
    mask = Mask(where.position, where.position, where.document, where.document, scale=work.head_size**-0.5,
                causal=work.causal, window=work.window)  # fmt: skip
    if not work.backward:
        return {"o": attention_reference.attention(q, k, v, mask).out[0]}
    gradients = attention_reference.attention_backward(do[0], q, k, v, mask)
    return {name: x[0] for name, x in zip(("dq", "dk", "dv"), gradients, strict=True)}


MASKS = ({}, {"causal": True}, {"window": 9}, {"causal": True, "window": 9}, {"documents": (0, 7, 30, 64)})


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_sampled_rows_of_attention_are_those_of_the_reference(peers: Any, options: Any, backward: bool) -> None:
    work = attention(64, 12, 3, "float32", backward=backward, **options)
    tokens, heads = work.sample(5)
    rows, plain = sys.modules["attentions"]._expected(work, 5)
    assert len(set(tokens)) == 24
    for name, whole in rows_by_definition(work, 5).items():
        np.testing.assert_allclose(rows[name], whole[tokens][:, heads], rtol=1e-9, atol=1e-12)
        assert 0 < np.abs(plain[name]).max() < 1e-4  # the same rows in float32
    seen = attention_reference.seen(Mask(*2 * (np.arange(64, dtype=np.int32),), causal=work.causal, window=work.window))
    if not work.documents:
        assert work.pairs == seen.sum()


@pytest.mark.parametrize("backward", [False, True])
def test_attention_of_two_ranks_and_of_one_take_turns(peers: Any, backward: bool) -> None:
    """Ours beside ours, and beside ours without a mask: programs that do two things are told which."""
    work, full = (attention(96, 16, 2, "float32", causal=c, backward=backward) for c in (True, False))
    one = ("fivedp_attention", 1, 1)
    entries = (peers.Entry("fivedp_attention", 2, 1, "zigzag"), peers.Entry(*one), peers.Entry(*one, work=full))
    arena = peers.Arena(rounds=2)
    try:
        record = arena.hold(peers.Contest("attention", work, entries), seed=5)
    finally:
        arena.close()
    assert record["missing"] == record["wrong"] == {}
    assert [len(e["samples"]) for e in record["entries"]] == [2, 2, 2]
    assert all(0 < e["error_over_plain"] < 4 for e in record["entries"])
    assert record["shape"] in "\n".join(peers.table(record))


@pytest.mark.parametrize("program", ["torch_sdpa", "torch_ring"])
def test_attention_of_torch_is_right(peers: Any, program: str) -> None:
    pytest.importorskip("torch")
    masks = MASKS if program == "torch_sdpa" else MASKS[:2]
    arena = peers.Arena(rounds=1)
    try:
        for number, options in enumerate(masks):
            for backward in (False, True):
                work = attention(64, 16, 2, ("float32", "bfloat16")[number % 2], backward=backward, **options)
                entry = peers.Entry(program, 1 if program == "torch_sdpa" else 2, 1)
                record = arena.hold(peers.Contest("torch", work, (entry,)), seed=5)
                assert record["missing"] == record["wrong"] == {}
    finally:
        arena.close()


def test_a_wrong_attention_is_named_and_not_timed(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver expects a mask that the program was not told of."""
    attentions = sys.modules["attentions"]
    right = attentions._expected
    monkeypatch.setattr(attentions, "_expected", lambda work, seed: right(replace(work, causal=True), seed))
    arena = peers.Arena(rounds=1)
    try:
        entry = peers.Entry("fivedp_attention", 1, 1)
        record = arena.hold(peers.Contest("one", attention(70, 16, 2, "float32"), (entry,)), seed=5)
    finally:
        arena.close()
    assert record["entries"] == []
    assert "o is off by" in record["wrong"]["fivedp_attention 1x1"]


MIXTURES = ({}, {"workload": "zipf"}, {"workload": "one_expert"})


def mixture_by_definition(work: Any, seed: int) -> dict[str, Any]:
    """y and all gradients in float64, every expert for every token; the gradient of the weights by differences."""
    peer = sys.modules["moe_peer"]
    case = {**work.sizes, "dtype": work.dtype, "seed": seed}
    made = peer.token_inputs(case, np.arange(work.tokens))
    x, router = made["x"].astype(np.float64), peer.router(case).astype(np.float64)
    gate, up, down = (w.astype(np.float64) for w in peer.expert_weights(case, range(work.experts)))
    logits = x @ router
    kept = np.argsort(-logits, axis=1)[:, : work.top_k]

    def share(z: Any) -> Any:
        risen = np.zeros_like(z)
        np.put_along_axis(risen, kept, np.exp(np.take_along_axis(z, kept, axis=1)), axis=1)
        return risen / risen.sum(axis=1, keepdims=True)

    g, u = (np.einsum("th,ehf->tef", x, w) for w in (gate, up))
    sigmoid = 1 / (1 + np.exp(-g))
    out = np.einsum("tef,efh->teh", g * sigmoid * u, down)
    found = {"y": np.einsum("te,teh->th", share(logits), out)}
    if work.backward:
        dy = made["dy"].astype(np.float64)
        dots, d_logits = np.einsum("th,teh->te", dy, out), np.zeros_like(logits)
        for e in range(work.experts):
            for step in (1e-5, -1e-5):
                moved = logits + step * (np.arange(work.experts) == e)
                d_logits[:, e] += (share(moved) * dots).sum(axis=1) / (2 * step)
        d_hidden = share(logits)[:, :, None] * np.einsum("th,efh->tef", dy, down)
        d_gate, d_up = d_hidden * u * sigmoid * (1 + g * (1 - sigmoid)), d_hidden * g * sigmoid
        found["dx"] = np.einsum("tef,ehf->th", d_gate, gate) + np.einsum("tef,ehf->th", d_up, up) + d_logits @ router.T
        found["d_gate"], found["d_up"] = (np.einsum("th,tef->ehf", x, d) for d in (d_gate, d_up))
        found["d_down"] = np.einsum("te,tef,th->efh", share(logits), g * sigmoid * u, dy)
    return found


@pytest.mark.parametrize("options", MIXTURES, ids=str)
def test_samples_of_a_mixture_are_those_of_the_dense_sum(peers: Any, options: Any) -> None:
    work = mixture(40, 20, 9, 5, 2, "float32", backward=True, **options)
    tokens, units = work.sample(5)
    found, plain = sys.modules["mixtures"]._expected(work, 5)
    whole = mixture_by_definition(work, 5)
    assert len(set(tokens)) == 16
    for name, rows in found.items():
        if name in ("y", "dx"):
            expected = whole[name][tokens]
        else:
            expected = np.stack([whole[name][e][u] if name == "d_down" else whole[name][e][:, u] for e, u in units])
        np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=1e-7)
        assert np.abs(plain[name]).max() < 1e-3  # the same in float32
    assert work.flops == 3 * 40 * 2 * 6 * 20 * 9


@pytest.mark.parametrize("backward", [False, True])
def test_experts_of_two_ranks_under_skew_and_evenly_take_turns(peers: Any, backward: bool) -> None:
    work, even = (mixture(48, 32, 16, 6, 2, "float32", w, backward) for w in ("one_expert", "uniform"))
    entries = (peers.Entry("fivedp_moe", 2, 1), peers.Entry("fivedp_moe", 2, 1, work=even))
    arena = peers.Arena(rounds=2)
    try:
        record = arena.hold(peers.Contest("skew", work, entries), seed=5)
    finally:
        arena.close()
    assert record["missing"] == record["wrong"] == {}
    assert [len(e["samples"]) for e in record["entries"]] == [2, 2]
    assert "one_expert" in record["shape"]


@pytest.mark.parametrize(("program", "ways"), [("torch_moe", ("naive", "deduplicated")), ("torch_experts", ("",)),
                                               ("numpy_moe", ("",))])  # fmt: skip
def test_experts_of_others_are_right(peers: Any, program: str, ways: tuple[str, ...]) -> None:
    if program != "numpy_moe":
        pytest.importorskip("torch")
    ranks = 1 if program == "torch_experts" else 2
    arena = peers.Arena(rounds=1)
    try:
        for number, options in enumerate(MIXTURES):
            for backward in (False, True)[: 1 if program == "numpy_moe" else 2]:
                dtype = ("float32", "bfloat16")[number % 2 if program != "numpy_moe" else 0]
                work = mixture(48, 32, 16, 6, 2, dtype, backward=backward, **options)
                entries = tuple(peers.Entry(program, ranks, 1, way) for way in ways)
                record = arena.hold(peers.Contest("others", work, entries), seed=5)
                assert record["missing"] == record["wrong"] == {}
    finally:
        arena.close()


def test_products_are_left_out_of_the_time_where_only_the_rest_is_asked_for(peers: Any) -> None:
    moe_peer, worker = sys.modules["moe_peer"], sys.modules["worker"]

    class Sleeper(moe_peer.MoePeer):  # type: ignore[name-defined, misc]
        def prepare(self, case: dict[str, Any]) -> None:
            self.case = case

        def run(self) -> None:
            with self.products():
                time.sleep(0.2)

        def outcome(self) -> dict[str, Any]:
            return {}

    sleeper = Sleeper()
    for outside in (False, True):
        worker._answer(sleeper, {"do": "prepare", "case": {"outside": outside}})
        (seconds,) = worker._answer(sleeper, {"do": "time", "repeats": 1, "inner": 2})["seconds"]
        assert (seconds < 0.2) == outside


def test_a_wrong_mixture_is_named_and_not_timed(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver expects tokens to have one expert more than the program was told."""
    mixtures = sys.modules["mixtures"]
    right = mixtures._expected
    monkeypatch.setattr(mixtures, "_expected", lambda work, seed: right(replace(work, top_k=3), seed))
    arena = peers.Arena(rounds=1)
    try:
        contest = peers.Contest("one", mixture(40, 32, 16, 6, 2, "bfloat16"), (peers.Entry("fivedp_moe", 2, 1),))
        record = arena.hold(contest, seed=5)
    finally:
        arena.close()
    assert record["entries"] == []
    assert "y is off by" in record["wrong"]["fivedp_moe 2x1"]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from /proc")
def test_long_context_prints_memory_of_all_ranks_and_the_error(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    arguments = ["--tokens", "700", "--head-size", "16", "--dtype", "float32", "--json", str(file)]
    done = run_mpi(3, BENCH / "long_context.py", args=arguments, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, increase, error = json.loads(file.read_text())["aims"]
    assert "S700 H2 D16 causal float32 on 3 ranks" in whole["title"]
    assert 0 < increase["measured"] < whole["measured"] < 2
    assert 1e9 * whole["measured"] < whole["resident"]  # pages that ranks share were counted once
    assert 0 < error["measured"] < 4


def test_a_part_of_a_contest_is_measured_again_and_the_others_are_kept(peers: Any, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for titles in ("window", "full, 16 documents", "window"):
        words = ["--suite", "attention-threads", "--size", "64", "--rounds", "1", "--without", "torch_sdpa", "--only",
                 titles, "--json", str(file), "--add"]  # fmt: skip
        subprocess.run([sys.executable, BENCH / "peers" / "compare.py", *words], check=True, timeout=120)
    result = json.loads(file.read_text())
    assert ["documents" in c["title"] for c in result["contests"]] == [True, False]
    tables = load(BENCH / "tables.py")
    assert "kernels" in tables.setting(result)
    assert tables.peers(result).startswith("| what | shape |")
