// AdamW on device arrays: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>

#include <cmath>

#include "bindings/device_arrays.hpp"
#include "cuda/pointwise_adamw.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

void step(const py::object& parameter_object, const py::object& gradient_object, const py::object& master_object,
          const py::object& first_moment_object, const py::object& second_moment_object, const py::object& scale_object,
          std::int64_t step, double learning_rate, double beta1, double beta2, double epsilon, double weight_decay,
          double factor, bool zero_gradient, std::uintptr_t stream) {
    check(step >= 1, "adamw: step is ", step, "; 1 for the first would be right");
    check(beta1 >= 0 && beta1 < 1 && beta2 >= 0 && beta2 < 1, "adamw: betas are ", beta1, " and ", beta2,
          "; 0 or more and below 1 would be right");
    const DeviceArray parameter = device_array(parameter_object, "adamw: parameter");
    const DeviceArray gradient = device_array(gradient_object, "adamw: gradient");
    AdamwProblem problem{};
    problem.type = number_type(parameter, "adamw: parameter");
    problem.gradient_type = number_type(gradient, "adamw: gradient");
    const std::string sums = sum_type_of(problem.type);
    expect(parameter, parameter.type, parameter.shape, true, "adamw: parameter");
    expect(gradient, gradient.type == sums ? sums : parameter.type, parameter.shape, zero_gradient, "adamw: gradient");
    problem.parameter = parameter.data;
    problem.gradient = gradient.data;
    problem.n = parameter.size();
    const auto state = [&](const py::object& object, const char* who) {
        const DeviceArray array = device_array(object, who);
        expect(array, sums, parameter.shape, true, who);
        return array.data;
    };
    if (parameter.type == sums) {
        check(master_object.is_none() || state(master_object, "adamw: master") == parameter.data,
              "adamw: master is not the parameter, which has its type; None would be right");
        problem.master = problem.parameter;
        problem.parameter = nullptr;
    } else {
        problem.master = state(master_object, "adamw: master");
    }
    problem.first_moment = state(first_moment_object, "adamw: first_moment");
    problem.second_moment = state(second_moment_object, "adamw: second_moment");
    const DeviceArray scale = optional_array(scale_object, "adamw: scale");
    if (!scale_object.is_none()) {
        check(scale.type == sums && scale.size() == 1, "adamw: scale has type ", scale.type, " and shape ",
              text_of(scale.shape), "; one number of ", sums, " would be right");
        problem.scale = scale.data;
    }
    problem.zero_gradient = zero_gradient;
    problem.factor = factor;
    problem.beta1 = beta1;
    problem.beta2 = beta2;
    problem.epsilon = epsilon;
    problem.keep = 1 - learning_rate * weight_decay;
    problem.step_size = learning_rate / (1 - std::pow(beta1, static_cast<double>(step)));
    problem.root = 1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step)));
    adamw(problem, stream_of(stream));
}

void norm(const py::object& x_object, const py::object& total_object, const py::object& workspace_object, bool add,
          std::uintptr_t stream) {
    const DeviceArray x = device_array(x_object, "squared_norm: x");
    const DeviceArray total = device_array(total_object, "squared_norm: total");
    const DeviceArray workspace = device_array(workspace_object, "squared_norm: workspace");
    expect(x, x.type, x.shape, false, "squared_norm: x");
    expect(total, "f8", {1}, true, "squared_norm: total");
    expect(workspace, "f8", {squared_norm_partials(x.size())}, true, "squared_norm: workspace");
    squared_norm({number_type(x, "squared_norm: x"), x.data, x.size(), reinterpret_cast<double*>(workspace.data),
                  reinterpret_cast<double*>(total.data), add},
                 stream_of(stream));
}

}  // namespace

void bind_cuda_adamw(py::module_& module) {
    module.def("adamw", &step);
    module.def("squared_norm", &norm);
    module.def("squared_norm_partials", &squared_norm_partials);
}

}  // namespace fivedp
