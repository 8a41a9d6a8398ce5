// Norms and other work on rows of device arrays: arguments are checked here, then a kernel is started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/device_arrays.hpp"
#include "cuda/pointwise.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

void rms_norm(const py::object& x_object, const py::object& gain_object, const py::object& y_object,
              const py::object& inverse_object, double epsilon, std::uintptr_t stream) {
    const DeviceArray x = device_array(x_object, "rms_norm: x"), y = device_array(y_object, "rms_norm: y");
    RmsNormProblem problem{};
    problem.type = number_type(x, "rms_norm: x");
    check(x.shape.size() == 2, "rms_norm: x has shape ", text_of(x.shape), "; (rows, columns) would be right");
    problem.rows = x.shape[0];
    problem.columns = x.shape[1];
    expect(x, x.type, x.shape, false, "rms_norm: x");
    expect(y, x.type, x.shape, true, "rms_norm: y");
    if (!gain_object.is_none()) {
        const DeviceArray gain = device_array(gain_object, "rms_norm: gain");
        expect(gain, x.type, {problem.columns}, false, "rms_norm: gain");
        problem.gain = gain.data;
    }
    if (!inverse_object.is_none()) {
        const DeviceArray inverse = device_array(inverse_object, "rms_norm: inverse");
        expect(inverse, sum_type_of(problem.type), {problem.rows}, true, "rms_norm: inverse");
        problem.inverse = inverse.data;
    }
    problem.x = x.data;
    problem.y = y.data;
    problem.x_stride = problem.y_stride = problem.columns;
    problem.epsilon = epsilon;
    rms_norm_forward(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_pointwise(py::module_& module) {
    module.def("rms_norm", &rms_norm);
}

}  // namespace fivedp
