// Activations on device arrays: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>

#include "bindings/device_activation.hpp"
#include "bindings/device_arrays.hpp"
#include "cuda/pointwise_activation.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

struct Rows {
    char* data = nullptr;
    std::int64_t stride = 0;
};

// Rows that may be None.
Rows rows_of(const py::object& object, const DeviceArray& like, bool written, const char* who) {
    if (object.is_none()) return {};
    const DeviceArray array = device_array(object, who);
    return {array.data, expect_rows(array, like.type, like.shape, written, who)[0]};
}

void forward(const py::object& gate_object, const py::object& up_object, const py::object& hidden_object,
             const std::string& activation, std::uintptr_t stream) {
    const DeviceArray up = device_array(up_object, "activation: up");
    check(up.shape.size() == 2, "activation: up has shape ", text_of(up.shape), "; (rows, columns) would be right");
    DeviceActivationProblem problem{};
    problem.type = number_type(up, "activation: up");
    problem.activation = activation_of(activation, !gate_object.is_none(), "activation");
    problem.rows = up.shape[0];
    problem.columns = up.shape[1];
    const Rows gate = rows_of(gate_object, up, false, "activation: gate");
    const Rows factors = rows_of(up_object, up, false, "activation: up");
    check(!hidden_object.is_none(), "activation: hidden is None; an array to write would be right");
    const Rows hidden = rows_of(hidden_object, up, true, "activation: hidden");
    problem.gate = gate.data;
    problem.gate_stride = gate.stride;
    problem.up = factors.data;
    problem.up_stride = factors.stride;
    problem.hidden = hidden.data;
    problem.hidden_stride = hidden.stride;
    if (problem.columns > 0) activation_forward(problem, stream_of(stream));
}

void backward(const py::object& d_hidden_object, const py::object& gate_object, const py::object& up_object,
              const py::object& weights, const py::object& d_gate_object, const py::object& d_up_object,
              const py::object& hidden_weighted_object, const py::object& d_weights, const std::string& activation,
              std::uintptr_t stream) {
    const DeviceArray up = device_array(up_object, "expert_hidden_backward: up");
    const DeviceArray d_hidden = device_array(d_hidden_object, "expert_hidden_backward: d_hidden");
    check(up.shape.size() == 2, "expert_hidden_backward: up has shape ", text_of(up.shape),
          "; (rows, columns) would be right");
    check(gate_object.is_none() == d_gate_object.is_none(),
          "expert_hidden_backward: one of gate and d_gate is None; both, or neither, would be right");
    DeviceActivationGradientProblem problem{};
    problem.type = number_type(up, "expert_hidden_backward: up");
    problem.d_hidden_type = number_type(d_hidden, "expert_hidden_backward: d_hidden");
    const std::string sums = sum_type_of(problem.type);
    problem.activation = activation_of(activation, !gate_object.is_none(), "expert_hidden_backward");
    problem.rows = up.shape[0];
    problem.columns = up.shape[1];
    problem.d_hidden = d_hidden.data;
    problem.d_hidden_stride = expect_rows(d_hidden, d_hidden.type == sums ? sums : up.type, up.shape, false,
                                          "expert_hidden_backward: d_hidden")[0];
    const Rows gate = rows_of(gate_object, up, false, "expert_hidden_backward: gate");
    const Rows factors = rows_of(up_object, up, false, "expert_hidden_backward: up");
    const Rows d_gate = rows_of(d_gate_object, up, true, "expert_hidden_backward: d_gate");
    check(!d_up_object.is_none(), "expert_hidden_backward: d_up is None; an array to write would be right");
    const Rows d_up = rows_of(d_up_object, up, true, "expert_hidden_backward: d_up");
    const Rows weighted = rows_of(hidden_weighted_object, up, true, "expert_hidden_backward: hidden_weighted");
    problem.gate = gate.data;
    problem.gate_stride = gate.stride;
    problem.up = factors.data;
    problem.up_stride = factors.stride;
    problem.d_gate = d_gate.data;
    problem.d_gate_stride = d_gate.stride;
    problem.d_up = d_up.data;
    problem.d_up_stride = d_up.stride;
    problem.hidden_weighted = weighted.data;
    problem.hidden_weighted_stride = weighted.stride;
    const DeviceArray weight = optional_array(weights, "expert_hidden_backward: weights");
    if (!weights.is_none()) expect(weight, sums, {problem.rows}, false, "expert_hidden_backward: weights");
    const DeviceArray d_weight = optional_array(d_weights, "expert_hidden_backward: d_weights");
    if (!d_weights.is_none()) expect(d_weight, sums, {problem.rows}, true, "expert_hidden_backward: d_weights");
    problem.weights = weight.data;
    problem.d_weights = d_weight.data;
    activation_backward(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_activation(py::module_& module) {
    module.def("activation_forward", &forward);
    module.def("expert_hidden_backward", &backward);
}

}  // namespace fivedp
