// Routing of tokens to experts on NumPy arrays: arguments are checked here, then the GIL is released for the
// arithmetic. bfloat16 arrives as a view of uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "common/check.hpp"
#include "cpu/routing_driver.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

bool native(const py::array& array, char kind, py::ssize_t size) {
    const char order = array.dtype().byteorder();
    return array.dtype().kind() == kind && array.itemsize() == size && (order == '=' || order == '|');
}

std::string text_of(const py::handle& object) {
    return py::str(object).cast<std::string>();
}

// The data of a contiguous array of this kind, size of element and shape.
void* data_of(const py::array& array, char kind, py::ssize_t size, std::initializer_list<std::int64_t> shape,
              bool written, const char* argument) {
    if (!native(array, kind, size))
        throw py::type_error(std::string("routing: ") + argument + " is " + text_of(array.dtype()) + "; " +
                             (kind == 'f' ? "float" : "int") + std::to_string(8 * size) + " would be right");
    bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    std::string wanted;
    py::ssize_t axis = 0;
    for (const std::int64_t length : shape) {
        same = same && array.shape(axis++) == length;
        wanted += (wanted.empty() ? "" : ", ") + std::to_string(length);
    }
    check(same, "routing: ", argument, " has shape ", text_of(array.attr("shape")), "; (", wanted, ") would be right");
    check((array.flags() & py::array::c_style) != 0, "routing: ", argument,
          " is strided; a contiguous array would be right");
    check(!written || array.writeable(), "routing: ", argument, " is read-only; a writeable array would be right");
    return const_cast<void*>(array.data());
}

// The same for an array that may be None.
void* data_or_null(const py::object& object, char kind, py::ssize_t size, std::initializer_list<std::int64_t> shape,
                   bool written, const char* argument) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array>(object))
        throw py::type_error(std::string("routing: ") + argument + " is no array; None or one would be right");
    return data_of(py::reinterpret_borrow<py::array>(object), kind, size, shape, written, argument);
}

py::ssize_t sum_bytes(const RoutingProblem& problem) {
    return problem.type == ElementType::f64 ? 8 : 4;
}

void check_experts(const std::int32_t* chosen, std::int64_t pairs, std::int64_t experts) {
    for (std::int64_t pair = 0; pair < pairs; ++pair)
        if (chosen[pair] < -1 || chosen[pair] >= experts)
            fail("routing: chosen has ", chosen[pair], "; -1 to ", experts - 1, " would be right");
}

// `rule` is (sigmoid, normalize, scale, bias or None, groups, top_groups, zero_mask).
RoutingProblem problem_of(const py::array& logits, std::int64_t top_k, const py::tuple& rule) {
    RoutingProblem problem{};
    if (native(logits, 'f', 4))
        problem.type = ElementType::f32;
    else if (native(logits, 'f', 8))
        problem.type = ElementType::f64;
    else if (native(logits, 'u', 2))
        problem.type = ElementType::bf16;
    else
        throw py::type_error("routing: logits is " + text_of(logits.dtype()) +
                             "; float32, float64 or bfloat16 in the machine's byte order would be right");
    check(logits.ndim() == 2, "routing: logits has shape ", text_of(logits.attr("shape")),
          "; (tokens, experts) would be right");
    problem.tokens = logits.shape(0);
    problem.experts = logits.shape(1);
    check(problem.experts >= 1 && problem.experts <= 1 << 20, "routing: there are ", problem.experts,
          " experts; 1 to 2^20 would be right");
    check(problem.tokens <= 1 << 22, "routing: there are ", problem.tokens, " tokens; up to 2^22 would be right");
    check(problem.tokens == 0 || problem.experts == 1 || logits.strides(1) == logits.itemsize(),
          "routing: the last dimension of logits is strided; a contiguous one would be right");
    problem.logits = static_cast<const char*>(logits.data());
    problem.row_stride = logits.strides(0);
    problem.top_k = top_k;
    check(top_k >= 0 && top_k <= problem.experts, "routing: top_k is ", top_k, "; 0 to ", problem.experts,
          ", the number of experts, would be right");
    check(rule.size() == 7, "routing: the rule has ", rule.size(), " entries; 7 would be right");
    problem.sigmoid = rule[0].cast<bool>();
    problem.normalize = rule[1].cast<bool>();
    problem.scale = rule[2].cast<double>();
    problem.bias = data_or_null(rule[3], 'f', sum_bytes(problem), {problem.experts}, false, "bias");
    problem.groups = rule[4].cast<std::int64_t>();
    problem.top_groups = rule[5].cast<std::int64_t>();
    problem.zero_mask = rule[6].cast<bool>();
    check(problem.groups >= 1 && problem.experts % problem.groups == 0, "routing: ", problem.experts,
          " experts are in ", problem.groups, " groups; a divisor would be right");
    check(problem.top_groups >= 1 && problem.top_groups <= problem.groups, "routing: top_groups is ",
          problem.top_groups, "; 1 to ", problem.groups, " would be right");
    return problem;
}

// `chosen` is read where the experts are given, written where they are to be found, and None where nobody asks.
py::tuple forward(const py::array& logits, std::int64_t top_k, const py::tuple& rule, const py::object& chosen,
                  bool given, const py::object& weights, const py::array& log_sum, const py::object& scores,
                  const py::array& choices, const py::array& probabilities) {
    RoutingProblem problem = problem_of(logits, top_k, rule);
    const py::ssize_t size = sum_bytes(problem);
    const std::int64_t tokens = problem.tokens, experts = problem.experts;
    problem.chosen = static_cast<std::int32_t*>(data_or_null(chosen, 'i', 4, {tokens, top_k}, !given, "chosen"));
    problem.weights = data_or_null(weights, 'f', size, {tokens, top_k}, true, "weights");
    problem.log_sum = data_of(log_sum, 'f', size, {tokens}, true, "log_sum");
    problem.scores = data_or_null(scores, 'f', size, {tokens, experts}, true, "scores");
    problem.choice = chosen.is_none() ? RoutingChoice::none : given ? RoutingChoice::given : RoutingChoice::by_score;
    check(chosen.is_none() == weights.is_none(), "routing: one of chosen and weights is None; both would be right");
    check(problem.choice != RoutingChoice::by_score || problem.zero_mask ||
              top_k <= problem.top_groups * (experts / problem.groups),
          "routing: top_k is ", top_k, ", but ", problem.top_groups, " of ", problem.groups, " groups have ",
          problem.top_groups * (experts / problem.groups), " experts; no more would be right");
    check(problem.choice != RoutingChoice::by_score || top_k >= 1, "routing: top_k is 0; 1 or more would be right");
    auto* const counts = static_cast<std::int64_t*>(data_of(choices, 'i', 8, {top_k, experts}, true, "choices"));
    auto* const sums = static_cast<std::int64_t*>(data_of(probabilities, 'i', 8, {experts}, true, "probabilities"));
    if (given) check_experts(problem.chosen, tokens * top_k, experts);
    RoutingTotals totals;
    {
        py::gil_scoped_release release;
        totals = run_routing_forward(problem, counts, sums);
    }
    return py::make_tuple(totals.first_invalid, totals.square_whole, totals.square_fraction, totals.beyond);
}

void backward(const py::array& d_weights, const py::array& logits, const py::tuple& rule, const py::array& chosen,
              const py::array& kept, const py::array& log_sum, const py::object& balance, double z_factor,
              const py::array& d_logits) {
    check(chosen.ndim() == 2, "routing: chosen has ", chosen.ndim(), " dimensions; 2 would be right");
    RoutingProblem problem = problem_of(logits, chosen.shape(1), rule);
    const py::ssize_t size = sum_bytes(problem);
    const std::int64_t tokens = problem.tokens, experts = problem.experts, top_k = problem.top_k;
    problem.chosen = static_cast<std::int32_t*>(data_of(chosen, 'i', 4, {tokens, top_k}, false, "chosen"));
    problem.kept = static_cast<const std::int32_t*>(data_of(kept, 'i', 4, {tokens, top_k}, false, "kept"));
    problem.d_weights = data_of(d_weights, 'f', size, {tokens, top_k}, false, "d_weights");
    problem.log_sum = data_of(log_sum, 'f', size, {tokens}, false, "log_sum");
    problem.balance = data_or_null(balance, 'f', size, {experts}, false, "balance");
    problem.z_factor = z_factor;
    problem.d_logits = data_of(d_logits, 'f', size, {tokens, experts}, true, "d_logits");
    check_experts(problem.chosen, tokens * top_k, experts);
    py::gil_scoped_release release;
    run_routing_backward(problem);
}

void drop(const py::array& chosen, std::int64_t capacity, const py::array& before, const py::array& kept) {
    check(chosen.ndim() == 2 && before.ndim() == 2, "routing: chosen has ", chosen.ndim(), " dimensions and before ",
          before.ndim(), "; 2 would be right");
    const std::int64_t tokens = chosen.shape(0), top_k = chosen.shape(1), experts = before.shape(1);
    const auto* const from =
        static_cast<const std::int32_t*>(data_of(chosen, 'i', 4, {tokens, top_k}, false, "chosen"));
    auto* const counts = static_cast<std::int64_t*>(data_of(before, 'i', 8, {top_k, experts}, true, "before"));
    auto* const to = static_cast<std::int32_t*>(data_of(kept, 'i', 4, {tokens, top_k}, true, "kept"));
    check_experts(from, tokens * top_k, experts);
    py::gil_scoped_release release;
    drop_by_position(from, tokens, top_k, experts, capacity, counts, to);
}

}  // namespace

void bind_routing(py::module_& module) {
    module.def("routing_forward", &forward);
    module.def("routing_backward", &backward);
    module.def("routing_drop", &drop);
}

}  // namespace fivedp
