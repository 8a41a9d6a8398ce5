// Norms of rows on device arrays: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device_arrays.hpp"
#include "cuda/pointwise_norm.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

using Shape = std::vector<std::int64_t>;

// A vector that may be None; its data.
char* vector_data(const py::object& object, const std::string& type, std::int64_t n, bool written, const char* who) {
    const DeviceArray array = optional_array(object, who);
    if (!object.is_none()) expect(array, type, {n}, written, who);
    return array.data;
}

Shape rows_and_columns(const DeviceArray& array, const char* who) {
    check(array.shape.size() == 2, who, " has shape ", text_of(array.shape), "; (rows, columns) would be right");
    return array.shape;
}

void forward(bool centered, const py::object& x_object, const py::object& residual_object, const py::object& gain,
             const py::object& bias, const py::object& sum_object, const py::object& y_object, const py::object& mean,
             const py::object& inverse, double epsilon, std::uintptr_t stream) {
    const DeviceArray x = device_array(x_object, "norm: x"), y = device_array(y_object, "norm: y");
    const Shape shape = rows_and_columns(x, "norm: x");
    NormProblem problem{};
    problem.type = number_type(x, "norm: x");
    problem.centered = centered;
    problem.rows = shape[0];
    problem.columns = shape[1];
    problem.epsilon = epsilon;
    problem.x = x.data;
    problem.x_stride = expect_rows(x, x.type, shape, false, "norm: x")[0];
    problem.y = y.data;
    problem.y_stride = expect_rows(y, x.type, shape, true, "norm: y")[0];
    check(residual_object.is_none() == sum_object.is_none(),
          "norm: one of residual and sum is None; both, or neither, would be right");
    if (!residual_object.is_none()) {
        const DeviceArray residual = device_array(residual_object, "norm: residual");
        const DeviceArray sum = device_array(sum_object, "norm: sum");
        problem.residual = residual.data;
        problem.residual_stride = expect_rows(residual, x.type, shape, false, "norm: residual")[0];
        problem.sum = sum.data;
        problem.sum_stride = expect_rows(sum, x.type, shape, true, "norm: sum")[0];
    }
    problem.gain = vector_data(gain, x.type, shape[1], false, "norm: gain");
    problem.bias = vector_data(bias, x.type, shape[1], false, "norm: bias");
    problem.mean = vector_data(mean, sum_type_of(problem.type), shape[0], true, "norm: mean");
    problem.inverse = vector_data(inverse, sum_type_of(problem.type), shape[0], true, "norm: inverse");
    norm_forward(problem, stream_of(stream));
}

void backward(bool centered, const py::object& dy_object, const py::object& sum_object, const py::object& gain,
              const py::object& mean, const py::object& inverse, const py::object& d_sum_object,
              const py::object& dx_object, const py::object& d_gain_object, const py::object& d_bias_object,
              const py::object& workspace_object, std::uintptr_t stream) {
    const DeviceArray dy = device_array(dy_object, "norm: dy"), sum = device_array(sum_object, "norm: x");
    const DeviceArray dx = device_array(dx_object, "norm: dx");
    const Shape shape = rows_and_columns(dy, "norm: dy");
    NormGradientProblem problem{};
    problem.type = number_type(dy, "norm: dy");
    const std::string sums = sum_type_of(problem.type);
    problem.centered = centered;
    problem.rows = shape[0];
    problem.columns = shape[1];
    problem.dy = dy.data;
    problem.dy_stride = expect_rows(dy, dy.type, shape, false, "norm: dy")[0];
    problem.sum = sum.data;
    problem.sum_stride = expect_rows(sum, dy.type, shape, false, "norm: x")[0];
    problem.dx = dx.data;
    problem.dx_stride = expect_rows(dx, dy.type, shape, true, "norm: dx")[0];
    if (!d_sum_object.is_none()) {
        const DeviceArray d_sum = device_array(d_sum_object, "norm: d_sum");
        problem.d_sum = d_sum.data;
        problem.d_sum_stride = expect_rows(d_sum, dy.type, shape, false, "norm: d_sum")[0];
    }
    problem.gain = vector_data(gain, dy.type, shape[1], false, "norm: gain");
    problem.inverse = vector_data(inverse, sums, shape[0], false, "norm: inverse");
    check(problem.inverse != nullptr || shape[0] == 0, "norm: inverse is None; what the forward wrote would be right");
    if (centered) {
        problem.mean = vector_data(mean, sums, shape[0], false, "norm: mean");
        check(problem.mean != nullptr || shape[0] == 0, "norm: mean is None; what the forward wrote would be right");
    }
    if (!d_gain_object.is_none() || !d_bias_object.is_none()) {
        const DeviceArray d_gain = optional_array(d_gain_object, "norm: d_gain");
        const std::string type =
            d_gain_object.is_none() ? device_array(d_bias_object, "norm: d_bias").type : d_gain.type;
        problem.gradients_of_sums = type == sums;
        const std::string expected = problem.gradients_of_sums ? sums : dy.type;
        problem.d_gain = vector_data(d_gain_object, expected, shape[1], true, "norm: d_gain");
        problem.d_bias = vector_data(d_bias_object, expected, shape[1], true, "norm: d_bias");
        const DeviceArray workspace = device_array(workspace_object, "norm: workspace");
        problem.n_partials = norm_partials(problem.type, shape[0], shape[1]);
        expect(workspace, sums,
               {problem.n_partials, d_bias_object.is_none() ? 1 : 2, norm_width(problem.type, shape[1])}, true,
               "norm: workspace");
        problem.workspace = workspace.data;
    }
    norm_backward(problem, stream_of(stream));
}

// (partials, width): two extents of the workspace of a backward.
std::pair<std::int64_t, std::int64_t> workspace_shape(const py::object& dy_object) {
    const DeviceArray dy = device_array(dy_object, "norm: dy");
    const Shape shape = rows_and_columns(dy, "norm: dy");
    const DeviceType type = number_type(dy, "norm: dy");
    return {norm_partials(type, shape[0], shape[1]), norm_width(type, shape[1])};
}

}  // namespace

void bind_cuda_norm(py::module_& module) {
    module.def("norm_forward", &forward);
    module.def("norm_backward", &backward);
    module.def("norm_workspace_shape", &workspace_shape);
}

}  // namespace fivedp
