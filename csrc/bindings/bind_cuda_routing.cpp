// Routing of tokens to experts on the GPU: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/device_rows.hpp"
#include "cuda/routing.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

// The data of a contiguous array; null for None.
void* data_of(const py::handle& object, const std::string& type, const std::vector<std::int64_t>& shape, bool written,
              const char* who) {
    if (object.is_none()) return nullptr;
    const DeviceArray array = device_array(object, who);
    expect(array, type, shape, written, who);
    static char none = 0;  // of no elements, but given
    return array.data != nullptr ? array.data : &none;
}

// `rule` is (sigmoid, normalize, scale, bias or None, groups, top_groups, zero_mask).
DeviceRouting problem_of(const py::handle& logits, std::int64_t top_k, const py::tuple& rule) {
    const DeviceMatrix matrix = device_matrix(logits, false, "routing: logits");
    DeviceRouting problem{};
    problem.type = matrix.view.type;
    problem.logits = matrix.view.data;
    problem.tokens = matrix.rows;
    check(matrix.rows <= 1 || matrix.view.stride % matrix.item == 0, "routing: logits has a stride of ",
          matrix.view.stride, " bytes; whole elements would be right");
    problem.row_stride = matrix.view.stride / matrix.item;
    check(matrix.columns >= 1 && matrix.columns <= most_routed_experts, "routing: there are ", matrix.columns,
          " experts; 1 to ", most_routed_experts, " would be right on a GPU");
    check(matrix.rows <= 1 << 22, "routing: there are ", matrix.rows, " tokens; up to 2^22 would be right");
    problem.experts = static_cast<int>(matrix.columns);
    const std::int64_t most = std::min(most_slots, matrix.columns);
    check(top_k >= 0 && top_k <= most, "routing: top_k is ", top_k, "; 0 to ", most, " would be right on a GPU");
    problem.top_k = static_cast<int>(top_k);
    check(rule.size() == 7, "routing: the rule has ", rule.size(), " entries; 7 would be right");
    problem.sigmoid = rule[0].cast<bool>();
    problem.normalize = rule[1].cast<bool>();
    problem.scale = rule[2].cast<double>();
    problem.bias = data_of(rule[3], sum_type_of(problem.type), {matrix.columns}, false, "routing: bias");
    problem.groups = rule[4].cast<int>();
    problem.top_groups = rule[5].cast<int>();
    problem.zero_mask = rule[6].cast<bool>();
    check(problem.groups >= 1 && problem.experts % problem.groups == 0, "routing: ", problem.experts,
          " experts are in ", problem.groups, " groups; a divisor would be right");
    check(problem.top_groups >= 1 && problem.top_groups <= problem.groups, "routing: top_groups is ",
          problem.top_groups, "; 1 to ", problem.groups, " would be right");
    return problem;
}

void forward(const py::handle& logits, std::int64_t top_k, const py::tuple& rule, const py::handle& chosen, bool given,
             const py::handle& weights, const py::handle& log_sum, const py::handle& scores, const py::handle& numbers,
             std::uintptr_t stream) {
    DeviceRouting problem = problem_of(logits, top_k, rule);
    const std::string sums = sum_type_of(problem.type);
    const std::int64_t experts = problem.experts;
    problem.chosen =
        static_cast<std::int32_t*>(data_of(chosen, "i4", {problem.tokens, top_k}, !given, "routing: chosen"));
    problem.weights = data_of(weights, sums, {problem.tokens, top_k}, true, "routing: weights");
    problem.log_sum = data_of(log_sum, sums, {problem.tokens}, true, "routing: log_sum");
    problem.scores = data_of(scores, sums, {problem.tokens, experts}, true, "routing: scores");
    problem.numbers = static_cast<std::int64_t*>(
        data_of(numbers, "i8", {first_choice + (top_k + 1) * experts}, true, "routing: numbers"));
    problem.choice = chosen.is_none() ? DeviceChoice::none : given ? DeviceChoice::given : DeviceChoice::by_score;
    check(chosen.is_none() == weights.is_none(), "routing: one of chosen and weights is None; both would be right");
    const std::int64_t reached = problem.top_groups * (experts / problem.groups);
    check(problem.choice != DeviceChoice::by_score || problem.zero_mask || top_k <= reached, "routing: top_k is ",
          top_k, ", but ", problem.top_groups, " of ", problem.groups, " groups have ", reached,
          " experts; no more would be right");
    check(problem.choice != DeviceChoice::by_score || top_k >= 1, "routing: top_k is 0; 1 or more would be right");
    routing_forward(problem, stream_of(stream));
}

void backward(const py::handle& d_weights, const py::handle& logits, const py::tuple& rule, const py::handle& chosen,
              const py::handle& kept, const py::handle& log_sum, const py::handle& balance, double z_factor,
              const py::handle& d_logits, std::uintptr_t stream) {
    const DeviceArray pairs = device_array(chosen, "routing: chosen");
    check(pairs.shape.size() == 2, "routing: chosen has shape ", text_of(pairs.shape),
          "; (tokens, slots) would be right");
    const std::int64_t top_k = pairs.shape[1];
    DeviceRouting problem = problem_of(logits, top_k, rule);
    const std::string sums = sum_type_of(problem.type);
    const std::vector<std::int64_t> shape{problem.tokens, top_k};
    problem.chosen = static_cast<std::int32_t*>(data_of(chosen, "i4", shape, false, "routing: chosen"));
    problem.kept = static_cast<const std::int32_t*>(data_of(kept, "i4", shape, false, "routing: kept"));
    problem.d_weights = data_of(d_weights, sums, shape, false, "routing: d_weights");
    problem.log_sum = data_of(log_sum, sums, {problem.tokens}, false, "routing: log_sum");
    problem.balance = data_of(balance, sums, {problem.experts}, false, "routing: balance");
    problem.z_factor = z_factor;
    problem.d_logits = data_of(d_logits, sums, {problem.tokens, problem.experts}, true, "routing: d_logits");
    routing_backward(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_routing(py::module_& module) {
    module.attr("ROUTING_NUMBERS") = static_cast<int>(first_choice);
    module.def("routing_forward", &forward);
    module.def("routing_backward", &backward);
}

}  // namespace fivedp
