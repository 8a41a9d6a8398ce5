// The order of dispatched rows on the GPU: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device_rows.hpp"
#include "cuda/dispatch_order.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

void check_experts(const char* who, std::int64_t experts) {
    check(experts >= 0 && experts <= most_local_experts, who, ": there are ", experts, " experts; 0 to ",
          most_local_experts, " would be right");
}

std::int64_t workspace_size(std::int64_t rows, std::int64_t tiles) {
    return rows * (tiles + 1);
}

void order(const py::handle& expert, const py::handle& token, int slots, const py::handle& starts,
           const py::handle& first_tile, std::int64_t tiles, std::int64_t first_expert, const py::handle& weights,
           const py::handle& source, const py::handle& row_token, const py::handle& row, const py::handle& row_weights,
           const py::handle& positions, const py::handle& counts, const py::handle& offsets, const py::handle& n_rows,
           const py::handle& workspace, std::uintptr_t stream) {
    DispatchOrder problem{};
    const DeviceArray pairs = device_array(expert, "dispatch_order: expert");
    problem.pairs = pairs.size();
    check(problem.pairs < INT32_MAX, "dispatch_order: there are ", problem.pairs, " pairs; below 2^31 would be right");
    expect(pairs, "i4", {problem.pairs}, false, "dispatch_order: expert");
    problem.expert = reinterpret_cast<const std::int32_t*>(pairs.data);
    problem.token = device_integers<std::int32_t>(token, problem.pairs, false, "dispatch_order: token");
    check(slots >= 1, "dispatch_order: slots is ", slots, "; 1 or more would be right");
    problem.slots = slots;
    problem.experts = static_cast<int>(device_array(counts, "dispatch_order: counts").size());
    check_experts("dispatch_order", problem.experts);
    problem.first_expert = static_cast<int>(first_expert);
    const std::int64_t sources = device_array(n_rows, "dispatch_order: n_rows").size();
    check(sources >= 1, "dispatch_order: there is no source; one or more would be right");
    problem.sources = static_cast<int>(sources);
    problem.starts = device_integers<std::int64_t>(starts, sources + 1, false, "dispatch_order: starts");
    problem.first_tile = device_integers<std::int64_t>(first_tile, sources + 1, false, "dispatch_order: first_tile");
    problem.tiles = tiles;
    problem.source = device_integers<std::int32_t>(source, problem.pairs, true, "dispatch_order: source");
    problem.row_token = device_integers<std::int32_t>(row_token, problem.pairs, true, "dispatch_order: row_token");
    problem.row = device_integers<std::int32_t>(row, problem.pairs, true, "dispatch_order: row");
    problem.positions = device_integers<std::int32_t>(positions, problem.pairs, true, "dispatch_order: positions");
    problem.counts = device_integers<std::int64_t>(counts, problem.experts, true, "dispatch_order: counts");
    problem.offsets = device_integers<std::int64_t>(offsets, problem.experts + 1, true, "dispatch_order: offsets");
    problem.n_rows = device_integers<std::int64_t>(n_rows, sources, true, "dispatch_order: n_rows");
    problem.workspace = device_integers<std::int32_t>(workspace, workspace_size(problem.experts + 1, tiles), true,
                                                      "dispatch_order: workspace");
    if (!weights.is_none()) {
        const DeviceArray from = device_array(weights, "dispatch_order: weights");
        const DeviceArray to = device_array(row_weights, "dispatch_order: row_weights");
        check(from.type == "f4" || from.type == "f8", "dispatch_order: weights has type ", from.type,
              "; f4 or f8 would be right");
        expect(from, from.type, {problem.pairs}, false, "dispatch_order: weights");
        expect(to, from.type, {problem.pairs}, true, "dispatch_order: row_weights");
        problem.weights = from.data;
        problem.row_weights = to.data;
        problem.weight_bytes = static_cast<int>(from.item_size());
    }
    dispatch_order(problem, stream_of(stream));
}

void drop(const py::handle& chosen, const py::handle& before, std::int64_t capacity, const py::handle& kept,
          const py::handle& workspace, std::uintptr_t stream) {
    const DeviceArray from = device_array(chosen, "drop_by_position: chosen");
    check(from.shape.size() == 2, "drop_by_position: chosen has shape ", text_of(from.shape),
          "; (tokens, slots) would be right");
    expect(from, "i4", from.shape, false, "drop_by_position: chosen");
    const DeviceArray counts = device_array(before, "drop_by_position: before");
    check(counts.shape.size() == 2, "drop_by_position: before has shape ", text_of(counts.shape),
          "; (slots, experts) would be right");
    expect(counts, "i8", {from.shape[1], counts.shape[1]}, false, "drop_by_position: before");
    const DeviceArray to = device_array(kept, "drop_by_position: kept");
    expect(to, "i4", from.shape, true, "drop_by_position: kept");
    check_experts("drop_by_position", counts.shape[1]);
    DropProblem problem{};
    problem.tokens = from.shape[0];
    problem.slots = static_cast<int>(from.shape[1]);
    problem.experts = static_cast<int>(counts.shape[1]);
    problem.chosen = reinterpret_cast<const std::int32_t*>(from.data);
    problem.before = reinterpret_cast<const std::int64_t*>(counts.data);
    problem.capacity = capacity;
    problem.kept = reinterpret_cast<std::int32_t*>(to.data);
    const std::int64_t tiles = (problem.tokens + tile_pairs - 1) / tile_pairs;
    problem.workspace =
        device_integers<std::int32_t>(workspace, workspace_size(std::int64_t(problem.slots) * problem.experts, tiles),
                                      true, "drop_by_position: workspace");
    drop_by_position(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_dispatch(py::module_& module) {
    module.attr("TILE_PAIRS") = tile_pairs;
    module.def("dispatch_order", &order);
    module.def("drop_by_position", &drop);
}

}  // namespace fivedp
