// Products of rows grouped by expert, on device arrays. The offsets' values are never read here.
#include <pybind11/pybind11.h>

#include "bindings/device_activation.hpp"
#include "bindings/gemm_operands.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

// x as an operand: a matrix (rows, columns), or what Python's fivedp.kernels.cuda.rows.CudaRows has: the addresses of
// rows that lie anywhere. `row_is_k`: its rows are the k of the product.
struct XArgument {
    GemmOperand operand;
    std::string type;
    DeviceType number;
    std::int64_t rows, columns;
};

XArgument x_argument(const py::handle& object, bool row_is_k, const char* who) {
    if (!py::hasattr(object, "addresses")) {
        const FactorArray factor = factor_array(object, row_is_k, who);
        check(!factor.batched, who, " has 3 dimensions; (rows, columns) would be right");
        // One way round only: groups begin anywhere, so nothing is aligned along the rows.
        return {operand_of(factor, 0, row_is_k), factor.array.type, number_type(factor.array, who),
                factor.array.shape[0], factor.array.shape[1]};
    }
    const DeviceArray addresses = device_array(object.attr("addresses"), who);
    DeviceArray row;
    row.type = object.attr("type").cast<std::string>();
    const std::int64_t rows = addresses.shape.at(0);
    expect(addresses, "i8", {rows}, false, who);
    XArgument x{};
    x.operand.rows = reinterpret_cast<const std::int64_t*>(addresses.data);
    // Where copies of no bytes point to: memory that is there.
    x.operand.data = reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(addresses.data) / 16 * 16);
    x.operand.column_stride = row.item_size();
    x.operand.rows_along_k = row_is_k;
    x.operand.vectors = object.attr("aligned").cast<bool>();
    x.type = row.type;
    x.number = number_type(row, who);
    x.rows = rows;
    x.columns = object.attr("columns").cast<std::int64_t>();
    return x;
}

void same_type(const std::string& one, const std::string& wanted, const char* who) {
    if (one != wanted) throw py::type_error(std::string(who) + " has type " + one + "; " + wanted + " would be right");
}

void read_offsets(GroupedProblem& problem, const py::handle& object, std::int64_t n_experts, const char* who) {
    const DeviceArray offsets = device_array(object, who);
    expect(offsets, "i8", {n_experts + 1}, false, who);
    problem.offsets = reinterpret_cast<const std::int64_t*>(offsets.data);
    problem.n_experts = n_experts;
}

FactorArray weights_argument(const py::handle& object, const std::string& type, const char* who) {
    const FactorArray weights = factor_array(object, true, who);
    check(weights.batched, who, " has 2 dimensions; (experts, K, N) would be right");
    same_type(weights.array.type, type, who);
    return weights;
}

const char* grouped_matmul(const py::sequence& x_pieces, const py::sequence& w_pieces, const py::object& offsets,
                           const py::object& out, bool hopper, std::uintptr_t stream) {
    GroupedProblem problem{};
    problem.kind = GroupedKind::matmul;
    const std::size_t n_pieces = x_pieces.size();
    check(n_pieces >= 1 && n_pieces <= max_grouped_pieces && w_pieces.size() == n_pieces, "grouped_matmul: x has ",
          n_pieces, " pieces and w ", w_pieces.size(), "; as many of both, 1 to ", max_grouped_pieces,
          ", would be right");
    std::string type;
    std::int64_t experts = 0;
    for (std::size_t i = 0; i < n_pieces; ++i) {
        const XArgument x = x_argument(x_pieces[i], false, "grouped_matmul: x");
        if (i == 0) {
            type = x.type;
            problem.type = x.number;
            problem.n_rows = x.rows;
        }
        same_type(x.type, type, "grouped_matmul: x");
        check(x.rows == problem.n_rows, "grouped_matmul: x has pieces of ", problem.n_rows, " and ", x.rows,
              " rows; pieces may differ along K only");
        const FactorArray w = weights_argument(w_pieces[i], type, "grouped_matmul: w");
        if (i == 0) {
            experts = w.batch();
            problem.n = w.outer();
        }
        check(w.batch() == experts && w.outer() == problem.n && w.k() == x.columns,
              "grouped_matmul: w has a piece of shape ", text_of(w.array.shape), "; (", experts, ", ", x.columns, ", ",
              problem.n, ") would be right");
        problem.x[i] = x.operand;
        problem.w[i] = operand_of(w, 0);
        problem.k[i] = x.columns;
    }
    problem.n_pieces = static_cast<int>(n_pieces);
    read_offsets(problem, offsets, experts, "grouped_matmul: offsets");
    problem.out = result_of(out, problem.type, type, -1, problem.n_rows, problem.n, true, "grouped_matmul: out");
    return grouped_product(problem, hopper, stream_of(stream));
}

const char* grouped_outer(const py::object& x_object, const py::object& y_object, const py::object& offsets,
                          const py::object& out, bool hopper, std::uintptr_t stream) {
    const XArgument x = x_argument(x_object, true, "grouped_outer: x");
    const XArgument y = x_argument(y_object, true, "grouped_outer: dy");
    same_type(y.type, x.type, "grouped_outer: dy");
    check(x.rows == y.rows, "grouped_outer: x has ", x.rows, " rows and dy ", y.rows, "; they must agree");
    const DeviceArray result = device_array(out, "grouped_outer: out");
    check(result.shape.size() == 3, "grouped_outer: out has shape ", text_of(result.shape), "; (experts, ", x.columns,
          ", ", y.columns, ") would be right");
    GroupedProblem problem{};
    problem.kind = GroupedKind::outer;
    problem.type = x.number;
    problem.n_rows = x.rows;
    problem.m = x.columns;
    problem.n = y.columns;
    problem.n_pieces = 1;
    problem.x[0] = x.operand;
    problem.w[0] = y.operand;
    read_offsets(problem, offsets, result.shape[0], "grouped_outer: offsets");
    problem.out =
        result_of(out, problem.type, x.type, result.shape[0], problem.m, problem.n, true, "grouped_outer: out");
    return grouped_product(problem, hopper, stream_of(stream));
}

const char* expert_hidden(const py::object& x_object, const py::object& w_gate, const py::object& w_up,
                          const py::object& offsets, const py::object& hidden, const py::object& gate,
                          const py::object& up, const std::string& activation, bool hopper, std::uintptr_t stream) {
    const XArgument x = x_argument(x_object, false, "expert_hidden: x");
    const FactorArray up_weights = weights_argument(w_up, x.type, "expert_hidden: w_up");
    check(up_weights.k() == x.columns, "expert_hidden: x has ", x.columns, " columns and w_up ", up_weights.k(),
          " rows an expert; they must agree");
    GroupedProblem problem{};
    problem.kind = GroupedKind::hidden;
    problem.type = x.number;
    problem.n_rows = x.rows;
    problem.n = up_weights.outer();
    problem.n_pieces = 1;
    problem.x[0] = x.operand;
    problem.k[0] = x.columns;
    problem.gated = !w_gate.is_none();
    problem.activation = activation_of(activation, problem.gated, "expert_hidden");
    if (problem.gated) {
        const FactorArray gate_weights = weights_argument(w_gate, x.type, "expert_hidden: w_gate");
        check(gate_weights.array.shape == up_weights.array.shape, "expert_hidden: w_gate has shape ",
              text_of(gate_weights.array.shape), " and w_up ", text_of(up_weights.array.shape), "; they must agree");
        problem.w[0] = operand_of(gate_weights, 0);
        problem.up_weights = operand_of(up_weights, 0, problem.w[0].rows_along_k);
        // A panel has both, so both are copied in one way.
        problem.w[0].vectors = problem.up_weights.vectors = problem.w[0].vectors && problem.up_weights.vectors;
    } else {
        check(gate.is_none(), "expert_hidden: gate is an array and w_gate is None; None would be right");
        problem.w[0] = operand_of(up_weights, 0);
    }
    read_offsets(problem, offsets, up_weights.batch(), "expert_hidden: offsets");
    const auto result = [&](const py::object& object, const char* who) {
        return object.is_none() ? GemmResult{}
                                : result_of(object, problem.type, x.type, -1, x.rows, problem.n, false, who);
    };
    problem.out = result(hidden, "expert_hidden: hidden");
    problem.gate = result(gate, "expert_hidden: gate");
    problem.up = result(up, "expert_hidden: up");
    return grouped_product(problem, hopper, stream_of(stream));
}

}  // namespace

void bind_cuda_grouped(py::module_& module) {
    module.def("grouped_matmul", &grouped_matmul);
    module.def("grouped_outer", &grouped_outer);
    module.def("expert_hidden", &expert_hidden);
}

}  // namespace fivedp
