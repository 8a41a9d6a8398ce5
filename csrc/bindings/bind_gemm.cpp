// gemm and tree_sum on NumPy arrays: arguments are checked here, then the GIL is released for the arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/arguments.hpp"
#include "common/check.hpp"
#include "common/thread_pool.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/gemm_driver.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

struct Shape {
    std::int64_t batch, rows, cols;
    bool batched;
};

ArrayView view_of(const py::array& array, const char* who, const char* argument) {
    check(array.ndim() == 2 || array.ndim() == 3, who, ": ", argument, " has ", array.ndim(),
          " dimensions; 2, or 3 with a batch, would be right");
    const int first = array.ndim() == 3 ? 1 : 0;
    ArrayView view;
    view.data = static_cast<char*>(const_cast<void*>(array.data()));
    view.batch = first ? array.shape(0) : 1;
    view.batch_stride = first && view.batch > 1 ? array.strides(0) : 0;
    view.rows = array.shape(first);
    view.cols = array.shape(first + 1);
    view.row_stride = array.strides(first);
    view.col_stride = array.strides(first + 1);
    view.type = type_of(array, who, argument);
    return view;
}

std::string shape_text(const ArrayView& view, bool batched) {
    std::ostringstream text;
    text << "(";
    if (batched) text << view.batch << ", ";
    text << view.rows << ", " << view.cols << ")";
    return text.str();
}

// One operand: its pieces, and what they have in common.
struct OperandArgument {
    std::vector<Piece> pieces;
    std::int64_t outer = 0, k = 0, batch = 1;
    bool batched = false;
    ElementType type = ElementType::f32;
};

// `a` is (m, k), `b` is (k, n).
OperandArgument read_operand(const py::handle& argument, const char* name, bool k_first) {
    OperandArgument operand;
    bool first = true;
    const auto add = [&](const py::handle& item) {
        if (!py::isinstance<py::array>(item))
            throw py::type_error(std::string("gemm: ") + name + " is " + Py_TYPE(item.ptr())->tp_name +
                                 "; a NumPy array or a sequence of them would be right");
        const py::array array = py::reinterpret_borrow<py::array>(item);
        const ArrayView view = view_of(array, "gemm", name);
        const std::int64_t outer = k_first ? view.cols : view.rows, k = k_first ? view.rows : view.cols;
        if (first) {
            operand.outer = outer;
            operand.batch = view.batch;
            operand.batched = array.ndim() == 3;
            operand.type = view.type;
            first = false;
        } else {
            check(view.type == operand.type, "gemm: ", name, " has pieces of ", name_of(operand.type), " and ",
                  name_of(view.type), "; one type would be right");
            check(outer == operand.outer && view.batch == operand.batch && (array.ndim() == 3) == operand.batched,
                  "gemm: ", name, " has a piece of shape ", shape_text(view, array.ndim() == 3), " beside pieces with ",
                  operand.outer, k_first ? " columns" : " rows", " and batch ", operand.batch,
                  "; pieces may differ along k only");
        }
        if (k > 0)
            operand.pieces.push_back({view.data, operand.k, operand.k + k, k_first ? view.col_stride : view.row_stride,
                                      k_first ? view.row_stride : view.col_stride, view.batch_stride});
        operand.k += k;
    };
    if (py::isinstance<py::array>(argument)) {
        add(argument);
    } else {
        if (!py::isinstance<py::sequence>(argument))
            throw py::type_error(std::string("gemm: ") + name + " is " + Py_TYPE(argument.ptr())->tp_name +
                                 "; a NumPy array or a sequence of them would be right");
        for (const py::handle item : py::reinterpret_borrow<py::sequence>(argument)) add(item);
        check(!first, "gemm: ", name, " has no pieces; at least one array would be right");
    }
    return operand;
}

// Borders of the virtual shards: the default ones, or as given.
std::vector<std::int64_t> read_cuts(const py::object& cuts, std::int64_t k) {
    std::vector<std::int64_t> borders;
    if (cuts.is_none()) {
        borders.resize(default_shards + 1);
        default_cuts(k, borders.data());
        return borders;
    }
    for (const py::handle cut : cuts) borders.push_back(cut.cast<std::int64_t>());
    check(borders.size() >= 2 && borders.front() == 0 && borders.back() == k, "gemm: cuts has ", borders.size(),
          " borders from ", borders.empty() ? 0 : borders.front(), " to ", borders.empty() ? 0 : borders.back(),
          "; at least two, from 0 to k = ", k, ", would be right");
    for (std::size_t i = 1; i < borders.size(); ++i)
        check(borders[i - 1] <= borders[i], "gemm: cuts goes down from ", borders[i - 1], " to ", borders[i],
              "; borders in rising order would be right");
    return borders;
}

void require_writable(const py::array& array, const char* who, const char* argument) {
    check(array.writeable(), who, ": ", argument, " is read-only; a writable array would be right");
}

void gemm(const py::object& a_pieces, const py::object& b_pieces, py::array c, const py::object& cuts, double alpha,
          double beta, const py::object& progress) {
    const OperandArgument a = read_operand(a_pieces, "a", false), b = read_operand(b_pieces, "b", true);
    GemmRequest request;
    GemmProblem& problem = request.problem;
    problem.c = view_of(c, "gemm", "c");
    require_writable(c, "gemm", "c");
    const ElementType c_type = problem.c.type;
    if (a.type != b.type || (c_type != a.type && !(a.type == ElementType::bf16 && c_type == ElementType::f32)))
        throw py::type_error(std::string("gemm: a is ") + name_of(a.type) + ", b is " + name_of(b.type) + " and c is " +
                             name_of(c_type) +
                             "; one type for all would be right, or float32 for c where a and b are bfloat16");
    check(a.k == b.k, "gemm: k is ", a.k, " in a and ", b.k, " in b; they must agree");
    const bool c_batched = c.ndim() == 3;
    check(problem.c.rows == a.outer && problem.c.cols == b.outer, "gemm: c has shape ",
          shape_text(problem.c, c_batched), "; a gives ", a.outer, " rows and b ", b.outer, " columns");
    check(c_batched == (a.batched || b.batched), "gemm: c has ", c.ndim(), " dimensions; ",
          a.batched || b.batched ? 3 : 2, " would be right, as a or b ",
          a.batched || b.batched ? "has a batch" : "has no batch");
    for (const OperandArgument* operand : {&a, &b})
        check(!operand->batched || operand->batch == problem.c.batch, "gemm: ", operand == &a ? "a" : "b",
              " has a batch of ", operand->batch, " and c of ", problem.c.batch, "; they must agree");
    const std::vector<std::int64_t> borders = read_cuts(cuts, a.k);

    request.type = a.type;
    request.m = a.outer;
    request.n = b.outer;
    problem.a = {a.pieces.data(), static_cast<std::int64_t>(a.pieces.size())};
    problem.b = {b.pieces.data(), static_cast<std::int64_t>(b.pieces.size())};
    problem.k = a.k;
    request.cuts = borders.data();
    request.n_shards = static_cast<std::int64_t>(borders.size()) - 1;
    problem.alpha = alpha;
    problem.beta = beta;

    const ProgressCall call(progress);
    {
        py::gil_scoped_release no_gil;
        run_gemm(request, call.function());
    }
    call.rethrow();
}

void tree_sum(const py::sequence& partials, const std::vector<std::pair<std::int64_t, std::int64_t>>& spans,
              py::array out, double alpha, double beta) {
    check(partials.size() > 0, "tree_sum: partials is empty; at least one array would be right");
    check(partials.size() == spans.size(), "tree_sum: there are ", partials.size(), " partials and ", spans.size(),
          " spans; one span for each partial would be right");
    TreeSumProblem problem;
    problem.out = view_of(out, "tree_sum", "out");
    require_writable(out, "tree_sum", "out");
    std::vector<ArrayView> views;
    std::vector<std::int64_t> leaves;
    std::int64_t expected = spans[0].first;
    for (std::size_t i = 0; i < spans.size(); ++i) {
        if (!py::isinstance<py::array>(partials[i]))
            throw py::type_error("tree_sum: a partial is no NumPy array; NumPy arrays of one type would be right");
        const py::array array = py::reinterpret_borrow<py::array>(partials[i]);
        views.push_back(view_of(array, "tree_sum", "a partial"));
        const ArrayView& view = views.back();
        if (view.type != views[0].type || view.type == ElementType::bf16)
            throw py::type_error(std::string("tree_sum: a partial is ") + name_of(view.type) +
                                 "; partials all float32 or all float64 would be right");
        check(array.ndim() == out.ndim() && view.batch == problem.out.batch && view.rows == problem.out.rows &&
                  view.cols == problem.out.cols,
              "tree_sum: a partial has shape ", shape_text(view, array.ndim() == 3), " and out ",
              shape_text(problem.out, out.ndim() == 3), "; they must agree");
        const auto [begin, count] = spans[i];
        check(begin == expected, "tree_sum: span ", i, " begins at shard ", begin, "; ", expected,
              " would be right: sorted, without gap or overlap");
        check(count > 0 && (count & (count - 1)) == 0 && begin % count == 0, "tree_sum: span ", i, " is (", begin, ", ",
              count, "); a power of two of shards that begins at a multiple of itself would be right");
        expected = begin + count;
        leaves.push_back(count);
    }
    if (problem.out.type != views[0].type &&
        !(problem.out.type == ElementType::bf16 && views[0].type == ElementType::f32))
        throw py::type_error(std::string("tree_sum: out is ") + name_of(problem.out.type) + " and the partials are " +
                             name_of(views[0].type) + "; one type, or float32 into bfloat16, would be right");
    problem.partials = views.data();
    problem.leaves = leaves.data();
    problem.n_partials = static_cast<std::int64_t>(views.size());
    problem.alpha = alpha;
    problem.beta = beta;
    py::gil_scoped_release no_gil;
    run_tree_sum(problem);
}

double multiply_adds(const py::array& like, std::int64_t rounds) {
    check(rounds >= 0, "multiply_adds: rounds is ", rounds, "; 0 or more would be right");
    const ElementType type = type_of(like, "multiply_adds", "like");
    py::gil_scoped_release no_gil;
    return run_multiply_adds(type, rounds);
}

void set_threads(int count) {
    check(count >= 1, "set_threads: count is ", count, "; 1 or more would be right");
    set_thread_count(count);
}

}  // namespace

void bind_gemm(py::module_& module) {
    module.def("gemm", &gemm, py::arg("a_pieces"), py::arg("b_pieces"), py::arg("c"), py::arg("cuts"), py::arg("alpha"),
               py::arg("beta"), py::arg("progress"));
    module.def("tree_sum", &tree_sum, py::arg("partials"), py::arg("spans"), py::arg("out"), py::arg("alpha"),
               py::arg("beta"));
    module.def("multiply_adds", &multiply_adds, py::arg("like"), py::arg("rounds"));
    module.def("threads", &thread_count);
    module.def("set_threads", &set_threads, py::arg("count"));
    module.def("isa", [] { return std::string(kernels().name); });
    module.def("supported_isas", &supported_isas);
}

}  // namespace fivedp
