// The experts' kernels on NumPy arrays: arguments are checked here, then the GIL is released for the arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/arguments.hpp"
#include "bindings/row_arguments.hpp"
#include "common/check.hpp"
#include "cpu/grouped_driver.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

struct Weights {
    WeightsPiece piece;
    std::int64_t experts, k, n;
    ElementType type;
};

Weights weights_of(const py::handle& argument, std::int64_t k_begin, const char* who, const char* name) {
    const py::array array = array_of(argument, who, name);
    check(array.ndim() == 3, who, ": ", name, " has shape ", shape_of(array), "; (experts, k, n) would be right");
    return {{data_of(array), k_begin, k_begin + array.shape(1), array.strides(0), array.strides(1), array.strides(2)},
            array.shape(0),
            array.shape(1),
            array.shape(2),
            type_of(array, who, name)};
}

Groups groups_of(const std::vector<std::int64_t>& offsets) {
    return {offsets.data(), static_cast<std::int64_t>(offsets.size()) - 1};
}

void check_experts(const Groups& groups, std::int64_t experts, const char* who, const char* name) {
    check(groups.count == experts, who, ": offsets has ", groups.count + 1, " entries and ", name, " is of ", experts,
          " experts; one entry more than experts would be right");
}

std::int64_t grouped_matmul(const py::sequence& x, const py::sequence& w, const py::handle& offsets,
                            const py::handle& out, const py::object& progress, const py::object& tiles) {
    const char* const who = "grouped_matmul";
    GroupedMatmulProblem problem;
    check(x.size() > 0 && w.size() > 0, who, ": ", x.size() > 0 ? "w" : "x",
          " has no pieces; at least one array would be right");
    std::int64_t rows = 0, experts = 0, k_of_w = 0;
    problem.k = 0;
    for (const py::handle item : x) {
        const Matrix matrix = matrix_of(item, who, "x");
        if (problem.x.empty()) {
            problem.type = matrix.view.type;
            rows = matrix.rows;
        }
        check_type(matrix.view.type, problem.type, who, "a piece of x");
        check(matrix.rows == rows, who, ": x has a piece of ", matrix.rows, " rows beside one of ", rows,
              "; pieces may differ along K only");
        problem.x.push_back(matrix.piece(problem.k));
        problem.k += matrix.columns;
    }
    for (const py::handle item : w) {
        const Weights weights = weights_of(item, k_of_w, who, "w");
        if (problem.w.empty()) {
            experts = weights.experts;
            problem.n = weights.n;
        }
        check_type(weights.type, problem.type, who, "w");
        check(weights.experts == experts && weights.n == problem.n, who, ": w has a piece of shape (", weights.experts,
              ", ", weights.k, ", ", weights.n, ") beside one of ", experts, " experts and ", problem.n,
              " columns; pieces may differ along K only");
        problem.w.push_back(weights.piece);
        k_of_w += weights.k;
    }
    check(problem.k == k_of_w, who, ": K is ", problem.k, " in x and ", k_of_w, " in w; they must agree");
    const std::vector<std::int64_t> all = borders(offsets, rows, who, "offsets");
    problem.groups = groups_of(all);
    check_experts(problem.groups, experts, who, "w");
    const py::array result = array_of(out, who, "out");
    const Matrix matrix = matrix_of(result, who, "out");
    check_result_type(matrix.view.type, problem.type, false, who, "out");
    check_shape(matrix, rows, problem.n, who, "out");
    check_writable(result, who, "out");
    problem.out = {matrix.view.data, 1, rows, problem.n, 0, matrix.view.stride, matrix.column_stride, matrix.view.type};
    const SharedTiles shared = shared_tiles(tiles, who);
    const ProgressCall call(progress);
    std::int64_t count = 0;
    {
        py::gil_scoped_release no_gil;
        count = run_grouped_matmul(problem, call.function(), shared);
    }
    call.rethrow();
    return count;
}

std::int64_t grouped_outer(const py::handle& x, const py::handle& dy, const py::handle& offsets, const py::handle& out,
                           const py::object& progress, const py::object& tiles) {
    const char* const who = "grouped_outer";
    const Matrix left = matrix_of(x, who, "x"), right = matrix_of(dy, who, "dy");
    GroupedOuterProblem problem;
    problem.type = left.view.type;
    check_type(right.view.type, problem.type, who, "dy");
    check(left.rows == right.rows, who, ": x has ", left.rows, " rows and dy ", right.rows, "; they must agree");
    problem.x = left.piece(0);
    problem.dy = right.piece(0);
    problem.k = left.columns;
    problem.n = right.columns;
    const std::vector<std::int64_t> all = borders(offsets, left.rows, who, "offsets");
    problem.groups = groups_of(all);
    const py::array result = array_of(out, who, "out");
    check(result.ndim() == 3 && result.shape(1) == problem.k && result.shape(2) == problem.n, who, ": out has shape ",
          shape_of(result), "; (experts, ", problem.k, ", ", problem.n, ") would be right");
    check_experts(problem.groups, result.shape(0), who, "out");
    problem.out = {data_of(result),   result.shape(0),   problem.k,         problem.n,
                   result.strides(0), result.strides(1), result.strides(2), type_of(result, who, "out")};
    check_result_type(problem.out.type, problem.type, false, who, "out");
    check_writable(result, who, "out");
    const SharedTiles shared = shared_tiles(tiles, who);
    const ProgressCall call(progress);
    std::int64_t count = 0;
    {
        py::gil_scoped_release no_gil;
        count = run_grouped_outer(problem, call.function(), shared);
    }
    call.rethrow();
    return count;
}

// The activation by its name; `gated` says whether a gate came with it.
Activation activation_of(const std::string& name, bool gated, const char* who, const char* gate) {
    if (name == "swiglu") {
        check(gated, who, ": activation is 'swiglu' and ", gate, " is None; an array would be right");
        return Activation::silu;
    }
    const bool known = name == "silu" || name == "gelu" || name == "gelu_tanh" || name == "relu";
    check(known, who, ": activation is '", name, "'; swiglu, gelu, gelu_tanh, relu or silu would be right");
    check(!gated, who, ": activation is '", name, "', which has no gate, and ", gate,
          " is an array; None would be right");
    return name == "silu"        ? Activation::silu
           : name == "gelu"      ? Activation::gelu
           : name == "gelu_tanh" ? Activation::gelu_tanh
                                 : Activation::relu;
}

std::int64_t expert_hidden(const py::handle& x, const py::handle& w_gate, const py::handle& w_up,
                           const py::handle& offsets, const py::handle& hidden, const py::handle& gate,
                           const py::handle& up, const std::string& activation, const py::object& progress,
                           const py::object& tiles) {
    const char* const who = "expert_hidden";
    ExpertHiddenProblem problem{};
    problem.activation = activation_of(activation, !w_gate.is_none(), who, "w_gate");
    const Matrix rows = matrix_of(x, who, "x");
    problem.type = rows.view.type;
    problem.x = rows.piece(0);
    problem.k = rows.columns;
    const Weights up_weights = weights_of(w_up, 0, who, "w_up");
    check_type(up_weights.type, problem.type, who, "w_up");
    check(up_weights.k == rows.columns, who, ": x has ", rows.columns, " columns and w_up ", up_weights.k,
          " rows an expert; they must agree");
    problem.w_up = up_weights.piece;
    problem.n = up_weights.n;
    if (!w_gate.is_none()) {
        const Weights gate_weights = weights_of(w_gate, 0, who, "w_gate");
        check_type(gate_weights.type, problem.type, who, "w_gate");
        check(gate_weights.experts == up_weights.experts && gate_weights.k == up_weights.k &&
                  gate_weights.n == up_weights.n,
              who, ": w_gate has shape (", gate_weights.experts, ", ", gate_weights.k, ", ", gate_weights.n,
              ") and w_up (", up_weights.experts, ", ", up_weights.k, ", ", up_weights.n, "); they must agree");
        problem.w_gate = gate_weights.piece;
        // Of no elements, but given.
        static const char none = 0;
        if (problem.w_gate.data == nullptr) problem.w_gate.data = &none;
    }
    const std::vector<std::int64_t> all = borders(offsets, rows.rows, who, "offsets");
    problem.groups = groups_of(all);
    check_experts(problem.groups, up_weights.experts, who, "w_up");
    const auto result = [&](const py::handle& argument, const char* name) {
        if (argument.is_none()) return RowsView{nullptr, 0, nullptr, problem.type};
        const RowsView view = written_rows(argument, rows.rows, problem.n, who, name);
        check_type(view.type, problem.type, who, name);
        return view;
    };
    problem.hidden = result(array_of(hidden, who, "hidden"), "hidden");
    check(gate.is_none() || !w_gate.is_none(), who, ": gate is an array and w_gate is None; None would be right");
    problem.gate = result(gate, "gate");
    problem.up = result(up, "up");
    const SharedTiles shared = shared_tiles(tiles, who);
    const ProgressCall call(progress);
    std::int64_t count = 0;
    {
        py::gil_scoped_release no_gil;
        count = run_expert_hidden(problem, call.function(), shared);
    }
    call.rethrow();
    return count;
}

std::int64_t expert_hidden_backward(const py::handle& d_hidden, const py::handle& gate, const py::handle& up,
                                    const py::handle& weights, const py::handle& d_gate, const py::handle& d_up,
                                    const py::handle& hidden_weighted, const py::handle& d_weights,
                                    const std::string& activation, const py::object& tiles) {
    const char* const who = "expert_hidden_backward";
    ActivationGradientProblem problem{};
    problem.activation = activation_of(activation, !gate.is_none(), who, "gate");
    check(gate.is_none() == d_gate.is_none(), who, ": ", gate.is_none() ? "d_gate" : "gate", " is given without ",
          gate.is_none() ? "gate" : "d_gate", "; both or neither would be right");
    const Matrix up_rows = rows_of(up, who, "up");
    problem.type = up_rows.view.type;
    problem.up = up_rows.view;
    problem.columns = up_rows.columns;
    const auto input = [&](const py::handle& argument, const char* name) {
        const Matrix matrix = rows_of(argument, who, name);
        check_shape(matrix, up_rows.rows, up_rows.columns, who, name);
        return matrix.view;
    };
    const auto output = [&](const py::handle& argument, const char* name) {
        const RowsView view = written_rows(argument, up_rows.rows, up_rows.columns, who, name);
        check_type(view.type, problem.type, who, name);
        return view;
    };
    problem.d_hidden = input(d_hidden, "d_hidden");
    check_result_type(problem.d_hidden.type, problem.type, false, who, "d_hidden");
    if (!gate.is_none()) {
        problem.gate = input(gate, "gate");
        check_type(problem.gate.type, problem.type, who, "gate");
        problem.d_gate = output(d_gate, "d_gate");
    }
    problem.d_up = output(d_up, "d_up");
    if (!hidden_weighted.is_none()) problem.hidden_weighted = output(hidden_weighted, "hidden_weighted");
    if (!weights.is_none()) problem.weights = row_values(weights, up_rows.rows, problem.type, false, who, "weights");
    if (!d_weights.is_none())
        problem.d_weights = row_values(d_weights, up_rows.rows, problem.type, true, who, "d_weights");
    const SharedTiles shared = shared_tiles(tiles, who);
    py::gil_scoped_release no_gil;
    return run_activation_gradient(problem, up_rows.rows, shared);
}

void combine_rows(const py::handle& rows, const py::handle& starts, const py::handle& weights,
                  const py::handle& experts, std::int64_t n_experts, const py::handle& out) {
    const char* const who = "combine_rows";
    const Matrix matrix = rows_of(rows, who, "rows");
    const std::vector<std::int64_t> all_starts = borders(starts, matrix.rows, who, "starts");
    const std::vector<std::int32_t> all_experts = integers<std::int32_t>(experts, who, "experts");
    check(static_cast<std::int64_t>(all_experts.size()) == matrix.rows, who, ": experts has ", all_experts.size(),
          " entries and there are ", matrix.rows, " rows; as many would be right");
    check(n_experts >= 0 && n_experts <= INT32_MAX, who, ": n_experts is ", n_experts, "; 0 to ", INT32_MAX,
          " would be right");
    for (std::size_t i = 0; i + 1 < all_starts.size(); ++i)
        for (std::int64_t p = all_starts[i]; p < all_starts[i + 1]; ++p) {
            const std::int32_t expert = all_experts[static_cast<std::size_t>(p)];
            check(expert >= 0 && expert < n_experts, who, ": experts[", p, "] is ", expert, "; 0 to ", n_experts - 1,
                  " would be right");
            check(p == all_starts[i] || expert > all_experts[static_cast<std::size_t>(p) - 1], who, ": experts[", p,
                  "] is ", expert, " after ", p > 0 ? all_experts[static_cast<std::size_t>(p) - 1] : 0,
                  " within output ", i, "; strictly rising experts would be right");
        }
    CombineProblem problem{};
    problem.rows = matrix.view;
    const std::int64_t outputs = static_cast<std::int64_t>(all_starts.size()) - 1;
    problem.out = written_rows(out, outputs, matrix.columns, who, "out");
    check_result_type(problem.out.type, matrix.view.type, true, who, "out");
    problem.starts = all_starts.data();
    if (!weights.is_none()) problem.weights = row_values(weights, matrix.rows, matrix.view.type, false, who, "weights");
    problem.experts = all_experts.data();
    problem.n_experts = n_experts;
    problem.columns = matrix.columns;
    py::gil_scoped_release no_gil;
    run_combine(problem, outputs);
}

void gather_rows(const py::handle& rows, const py::handle& out) {
    const char* const who = "gather_rows";
    const Matrix matrix = rows_of(rows, who, "rows");
    const RowsView to = written_rows(out, matrix.rows, matrix.columns, who, "out");
    check_type(to.type, matrix.view.type, who, "out");
    py::gil_scoped_release no_gil;
    run_gather_rows(matrix.view, to, matrix.rows, matrix.columns * matrix.item());
}

void weighted_rows(const py::handle& dy, const py::handle& weights, const py::handle& out) {
    const char* const who = "weighted_rows";
    const Matrix matrix = rows_of(dy, who, "dy");
    WeightedRowsProblem problem;
    problem.rows = matrix.view;
    problem.weights = row_values(weights, matrix.rows, matrix.view.type, false, who, "weights");
    problem.out = written_rows(out, matrix.rows, matrix.columns, who, "out");
    check_result_type(problem.out.type, matrix.view.type, true, who, "out");
    problem.columns = matrix.columns;
    py::gil_scoped_release no_gil;
    run_weighted_rows(problem, matrix.rows);
}

void row_dots(const py::handle& a, const py::handle& b, const py::handle& out) {
    const char* const who = "row_dots";
    const Matrix left = rows_of(a, who, "a"), right = rows_of(b, who, "b");
    check_shape(right, left.rows, left.columns, who, "b");
    if (sum_type(left.view.type) != sum_type(right.view.type))
        throw py::type_error(std::string(who) + ": a is " + name_of(left.view.type) + " and b is " +
                             name_of(right.view.type) + "; both float64 or neither would be right");
    RowDotsProblem problem;
    problem.a = left.view;
    problem.b = right.view;
    problem.out = row_values(out, left.rows, left.view.type, true, who, "out");
    problem.columns = left.columns;
    py::gil_scoped_release no_gil;
    run_row_dots(problem, left.rows);
}

}  // namespace

void bind_experts(py::module_& module) {
    py::class_<RowTable>(module, "RowTable")
        .def(py::init<const py::sequence&, const py::handle&, const py::handle&>(), py::arg("arrays"),
             py::arg("source"), py::arg("index"));
    module.def("grouped_matmul", &grouped_matmul, py::arg("x"), py::arg("w"), py::arg("offsets"), py::arg("out"),
               py::arg("progress"), py::arg("tiles"));
    module.def("grouped_outer", &grouped_outer, py::arg("x"), py::arg("dy"), py::arg("offsets"), py::arg("out"),
               py::arg("progress"), py::arg("tiles"));
    module.def("expert_hidden", &expert_hidden, py::arg("x"), py::arg("w_gate"), py::arg("w_up"), py::arg("offsets"),
               py::arg("hidden"), py::arg("gate"), py::arg("up"), py::arg("activation"), py::arg("progress"),
               py::arg("tiles"));
    module.def("expert_hidden_backward", &expert_hidden_backward, py::arg("d_hidden"), py::arg("gate"), py::arg("up"),
               py::arg("weights"), py::arg("d_gate"), py::arg("d_up"), py::arg("hidden_weighted"), py::arg("d_weights"),
               py::arg("activation"), py::arg("tiles"));
    module.def("combine_rows", &combine_rows, py::arg("rows"), py::arg("starts"), py::arg("weights"),
               py::arg("experts"), py::arg("n_experts"), py::arg("out"));
    module.def("gather_rows", &gather_rows, py::arg("rows"), py::arg("out"));
    module.def("weighted_rows", &weighted_rows, py::arg("dy"), py::arg("weights"), py::arg("out"));
    module.def("row_dots", &row_dots, py::arg("a"), py::arg("b"), py::arg("out"));
}

}  // namespace fivedp
