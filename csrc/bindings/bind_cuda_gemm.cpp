// The product of device arrays: arguments are checked and cut into segments here, then the kernel is started.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/gemm_operands.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

struct Pieces {
    std::vector<FactorArray> arrays;
    std::vector<std::int64_t> begins{0};  // along k, and the end
    std::int64_t outer = 0, batch = 1;
    bool batched = false;
};

Pieces read_pieces(const py::sequence& arrays, bool k_first, const char* who) {
    Pieces pieces;
    for (const py::handle object : arrays) {
        const FactorArray factor = factor_array(object, k_first, who);
        if (pieces.arrays.empty()) {
            pieces.outer = factor.outer();
            pieces.batch = factor.batch();
            pieces.batched = factor.batched;
        }
        check(factor.outer() == pieces.outer && factor.batch() == pieces.batch && factor.batched == pieces.batched, who,
              " has a piece of shape ", text_of(factor.array.shape), " beside one of ", pieces.outer,
              k_first ? " columns" : " rows", "; pieces may differ along k only");
        if (!pieces.arrays.empty() && factor.array.type != pieces.arrays[0].array.type)
            throw py::type_error(std::string(who) + " has pieces of types " + pieces.arrays[0].array.type + " and " +
                                 factor.array.type + "; one type would be right");
        pieces.arrays.push_back(factor);
        pieces.begins.push_back(pieces.begins.back() + factor.k());
    }
    check(!pieces.arrays.empty(), who, " has no pieces; at least one array would be right");
    return pieces;
}

// The part of the operand that begins at k; `end` is lowered to where its piece ends.
GemmOperand operand_at(const Pieces& pieces, std::int64_t k, std::int64_t& end) {
    std::size_t i = 0;
    while (i + 1 < pieces.arrays.size() && pieces.begins[i + 1] <= k) ++i;
    end = std::min(end, pieces.begins[i + 1]);
    return operand_of(pieces.arrays[i], k - pieces.begins[i]);
}

int trailing_ones(std::int64_t value) {
    int n = 0;
    for (; value & 1; value >>= 1) ++n;
    return n;
}

// Fills in segments, the sums that each shard takes up, and how many are open at a time.
void plan(const Pieces& a, const Pieces& b, const std::vector<std::int64_t>& cuts, GemmProblem& problem) {
    const std::int64_t n_shards = static_cast<std::int64_t>(cuts.size()) - 1;
    int open = 0;
    for (std::int64_t shard = 0; shard < n_shards; ++shard) {
        const std::int64_t begin = cuts[static_cast<std::size_t>(shard)],
                           end = cuts[static_cast<std::size_t>(shard) + 1];
        std::int64_t k = begin;
        do {
            check(problem.n_segments < max_gemm_segments, "gemm: cuts and pieces make more than ", max_gemm_segments,
                  " segments of k; fewer would be right");
            std::int64_t stop = end;
            GemmSegment& segment = problem.segments[problem.n_segments++];
            segment.a = operand_at(a, k, stop);
            segment.b = operand_at(b, k, stop);
            check(stop == end || (stop - begin) % gemm_depth(problem.type) == 0, "gemm: a piece ends ", stop - begin,
                  " into a shard; a multiple of ", gemm_depth(problem.type), " would be right");
            segment.first_k = k;
            segment.k = stop - k;
            segment.merges = -1;
            k = stop;
        } while (k < end);
        const int merges = shard + 1 == n_shards ? open : trailing_ones(shard);
        problem.segments[problem.n_segments - 1].merges = merges;
        open += 1 - merges;
        if (shard + 1 < n_shards) problem.n_open = std::max(problem.n_open, open);
    }
}

const char* gemm_call(const py::sequence& a_pieces, const py::sequence& b_pieces, const py::object& c_object,
                      const std::vector<std::int64_t>& cuts, double alpha, double beta, const py::object& ready_object,
                      std::int64_t panel, bool ready_along_m, const py::object& workspace_object, bool hopper,
                      std::uintptr_t stream) {
    const Pieces a = read_pieces(a_pieces, false, "gemm: a"), b = read_pieces(b_pieces, true, "gemm: b");
    const std::string& type = a.arrays[0].array.type;
    GemmProblem problem{};
    problem.type = number_type(a.arrays[0].array, "gemm: a");
    if (b.arrays[0].array.type != type)
        throw py::type_error("gemm: a has type " + type + " and b " + b.arrays[0].array.type +
                             "; one type would be right");
    const std::int64_t k = a.begins.back();
    check(k == b.begins.back(), "gemm: k is ", k, " in a and ", b.begins.back(), " in b; they must agree");
    check(!a.batched || !b.batched || a.batch == b.batch, "gemm: a has a batch of ", a.batch, " and b of ", b.batch,
          "; they must agree");
    check(cuts.size() >= 2 && cuts.front() == 0 && cuts.back() == k && std::is_sorted(cuts.begin(), cuts.end()),
          "gemm: cuts is ", text_of(cuts), "; rising borders from 0 to k = ", k, " would be right");
    problem.batch = a.batched ? a.batch : b.batch;
    problem.m = a.outer;
    problem.n = b.outer;
    const bool batched = a.batched || b.batched;
    problem.c =
        result_of(c_object, problem.type, type, batched ? problem.batch : -1, problem.m, problem.n, true, "gemm: c");
    problem.alpha = alpha;
    problem.beta = beta;
    plan(a, b, cuts, problem);
    if (!ready_object.is_none()) {
        const DeviceArray ready = device_array(ready_object, "gemm: ready");
        check(panel > 0, "gemm: panel is ", panel, "; the extent of a panel, at least 1, would be right");
        expect(ready, "i4", {((ready_along_m ? problem.m : k) + panel - 1) / panel}, false, "gemm: ready");
        problem.ready = reinterpret_cast<const int*>(ready.data);
        problem.panel = panel;
        problem.ready_along_m = ready_along_m;
    }
    if (problem.n_open > 0 && problem.batch > 0 && problem.m > 0 && problem.n > 0) {
        const DeviceArray workspace = device_array(workspace_object, "gemm: workspace");
        problem.workspace = workspace.data;
        problem.workspace_bytes = workspace.size() * workspace.item_size();
        const std::int64_t least = gemm_workspace(problem.type, hopper, 1, 1, 1, problem.n_open);
        check(workspace.writeable && workspace.contiguous() && problem.workspace_bytes >= least &&
                  reinterpret_cast<std::uintptr_t>(workspace.data) % 16 == 0,
              "gemm: workspace has ", problem.workspace_bytes, " bytes; a contiguous array of at least ", least,
              ", aligned to 16, would be right");
    }
    py::gil_scoped_release no_gil;
    return gemm(problem, hopper, stream_of(stream));
}

// Open sums of n_shards at a time: before the last shard, the most ones of a number of shards that are done.
std::int64_t workspace_of(const py::object& a, std::int64_t batch, std::int64_t m, std::int64_t n,
                          std::int64_t n_shards, bool hopper) {
    int most = 0;
    for (std::int64_t done = 1; done < n_shards; ++done)
        most = std::max(most, __builtin_popcountll(static_cast<unsigned long long>(done)));
    return gemm_workspace(number_type(device_array(a, "gemm: a"), "gemm: a"), hopper, batch, m, n, most);
}

}  // namespace

void bind_cuda_gemm(py::module_& module) {
    module.def("gemm", &gemm_call);
    module.def("gemm_workspace", &workspace_of);
    module.attr("max_gemm_segments") = max_gemm_segments;
}

}  // namespace fivedp
