// Rows of experts on the GPU: arguments are checked here, then a kernel is started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device_rows.hpp"
#include "cuda/expert_rows.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

// A result keeps sums over elements of `rows`: in that type, or in float32 or a 16-bit type where sums are float32.
void expect_result(DeviceType type, DeviceType rows, const char* who) {
    if ((type == DeviceType::f64) != (rows == DeviceType::f64))
        throw py::type_error(std::string(who) + " is " + name_of(type) + " beside rows of " + name_of(rows) + "; " +
                             (rows == DeviceType::f64 ? "float64" : "float32, bfloat16 or float16") +
                             " would be right");
}

// One number a row, in the type of sums; null for None.
char* row_values(const py::handle& object, std::int64_t rows, DeviceType type, bool written, const char* who) {
    if (object.is_none()) return nullptr;
    const DeviceArray array = device_array(object, who);
    expect(array, sum_type_of(type), {rows}, written, who);
    static char none = 0;  // of no elements, but given
    return array.data != nullptr ? array.data : &none;
}

void gather(const py::handle& rows, const py::handle& out, std::uintptr_t stream) {
    const DeviceMatrix from = device_rows(rows, "gather_rows: rows");
    const DeviceMatrix to = device_matrix(out, true, "gather_rows: out");
    if (to.view.type != from.view.type)
        throw py::type_error(std::string("gather_rows: out is ") + name_of(to.view.type) + "; " +
                             name_of(from.view.type) + ", the type of the rows, would be right");
    expect_shape(to, from.rows, from.columns, "gather_rows: out");
    DeviceGather problem{from.view, to.data(), to.view.stride, from.rows, from.columns * from.item, 2};
    const std::uint64_t bits = from.bits | to.bits | static_cast<std::uint64_t>(problem.row_bytes);
    problem.word = bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
    gather_rows(problem, stream_of(stream));
}

void weigh(const py::handle& rows, const py::handle& weights, const py::handle& out, std::uintptr_t stream) {
    const DeviceMatrix from = device_rows(rows, "weighted_rows: dy");
    const DeviceMatrix to = device_matrix(out, true, "weighted_rows: out");
    expect_shape(to, from.rows, from.columns, "weighted_rows: out");
    expect_result(to.view.type, from.view.type, "weighted_rows: out");
    check(!weights.is_none(), "weighted_rows: weights is None; an array would be right");
    DeviceWeightedRows problem{};
    problem.rows = from.view;
    problem.weights = row_values(weights, from.rows, from.view.type, false, "weighted_rows: weights");
    problem.out = to.data();
    problem.out_stride = to.view.stride;
    problem.out_type = to.view.type;
    problem.n_rows = from.rows;
    problem.columns = from.columns;
    problem.aligned = from.aligned() && to.aligned();
    weighted_rows(problem, stream_of(stream));
}

void dots(const py::handle& a, const py::handle& b, const py::handle& out, std::uintptr_t stream) {
    const DeviceMatrix left = device_rows(a, "row_dots: a"), right = device_rows(b, "row_dots: b");
    expect_shape(right, left.rows, left.columns, "row_dots: b");
    expect_result(right.view.type, left.view.type, "row_dots: b");
    check(!out.is_none(), "row_dots: out is None; an array would be right");
    DeviceRowDots problem{left.view, right.view, nullptr, left.rows, left.columns};
    problem.out = row_values(out, left.rows, left.view.type, true, "row_dots: out");
    row_dots(problem, stream_of(stream));
}

void combine(const py::handle& rows, const py::handle& starts, const py::handle& weights, const py::handle& experts,
             std::int64_t n_experts, const py::handle& out, std::int64_t most, std::uintptr_t stream) {
    const DeviceMatrix from = device_rows(rows, "combine_rows: rows");
    const DeviceMatrix to = device_matrix(out, true, "combine_rows: out");
    check(n_experts >= 0 && n_experts <= most_combined_experts, "combine_rows: n_experts is ", n_experts, "; 0 to ",
          most_combined_experts, " would be right");
    expect_shape(to, to.rows, from.columns, "combine_rows: out");
    expect_result(to.view.type, from.view.type, "combine_rows: out");
    DeviceCombine problem{};
    problem.rows = from.view;
    problem.starts = device_integers<std::int64_t>(starts, to.rows + 1, false, "combine_rows: starts");
    problem.weights = row_values(weights, from.rows, from.view.type, false, "combine_rows: weights");
    problem.experts = device_integers<std::int32_t>(experts, from.rows, false, "combine_rows: experts");
    check(problem.starts != nullptr && problem.experts != nullptr,
          "combine_rows: ", problem.starts == nullptr ? "starts" : "experts", " is None; an array would be right");
    problem.n_experts = static_cast<int>(n_experts);
    problem.out = to.data();
    problem.out_stride = to.view.stride;
    problem.out_type = to.view.type;
    problem.outputs = to.rows;
    problem.columns = from.columns;
    problem.aligned = from.aligned() && to.aligned();
    problem.most = most;
    combine_rows(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_expert_rows(py::module_& module) {
    module.def("gather_rows", &gather);
    module.def("weighted_rows", &weigh);
    module.def("row_dots", &dots);
    module.def("combine_rows", &combine);
}

}  // namespace fivedp
