// tree_sum on device arrays: arguments are checked and the order of the sum is laid out here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/device_arrays.hpp"
#include "cuda/tree_sum.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

DeviceMatrix matrix(const DeviceArray& array, const char* who) {
    std::int64_t strides[3] = {0, 0, 0};
    const std::size_t n = array.shape.size();
    for (std::size_t d = 0; d < n; ++d) {
        check(array.strides[d] % array.item_size() == 0, who, " has a stride of ", array.strides[d],
              " bytes; whole elements would be right");
        strides[3 - n + d] = array.strides[d] / array.item_size();
    }
    return {array.data, strides[0], strides[1], strides[2]};
}

// How many open sums each partial joins, and the most that wait beside the last: subtrees of equal size are added as
// they come, and at the end all that are left, from the smallest up.
void plan(const std::vector<std::int64_t>& leaves, DeviceTreeSumProblem& problem) {
    std::vector<std::int64_t> open;
    for (std::size_t i = 0; i < leaves.size(); ++i) {
        problem.depth = std::max(problem.depth, static_cast<int>(open.size()));
        open.push_back(leaves[i]);
        const bool last = i + 1 == leaves.size();
        for (; open.size() > 1 && (last || open[open.size() - 2] == open.back()); ++problem.joins[i]) {
            const std::int64_t right = open.back();
            open.pop_back();
            open.back() += right;
        }
    }
}

void sum(const py::sequence& partials, const std::vector<std::pair<std::int64_t, std::int64_t>>& spans,
         const py::object& out_object, double alpha, double beta, std::uintptr_t stream) {
    const std::size_t n = partials.size();
    check(n > 0, "tree_sum: partials is empty; at least one array would be right");
    check(n <= max_partials, "tree_sum: there are ", n, " partials; ", max_partials, " or fewer would be right");
    check(n == spans.size(), "tree_sum: there are ", n, " partials and ", spans.size(),
          " spans; one span for each partial would be right");
    const DeviceArray out = device_array(out_object, "tree_sum: out");
    const std::size_t n_dimensions = out.shape.size();
    check(n_dimensions == 2 || n_dimensions == 3, "tree_sum: out has shape ", text_of(out.shape),
          "; (m, n), or (batch, m, n), would be right");
    check(out.writeable, "tree_sum: out is read-only; a writeable array would be right");
    DeviceTreeSumProblem problem{};
    problem.out_type = number_type(out, "tree_sum: out");
    problem.out = matrix(out, "tree_sum: out");
    problem.batch = n_dimensions == 3 ? out.shape[0] : 1;
    problem.rows = out.shape[n_dimensions - 2];
    problem.columns = out.shape[n_dimensions - 1];
    problem.n_partials = static_cast<int>(n);
    problem.alpha = alpha;
    problem.beta = beta;
    std::vector<std::int64_t> leaves;
    std::int64_t expected = spans[0].first;
    for (std::size_t i = 0; i < n; ++i) {
        const DeviceArray partial = device_array(partials[i], "tree_sum: a partial");
        const DeviceType type = number_type(partial, "tree_sum: a partial");
        if (i == 0) problem.type = type;
        if (type != problem.type || (type != DeviceType::f32 && type != DeviceType::f64))
            throw py::type_error("tree_sum: a partial has type " + partial.type +
                                 "; partials all float32 or all float64 would be right");
        check(partial.shape == out.shape, "tree_sum: a partial has shape ", text_of(partial.shape), " and out ",
              text_of(out.shape), "; they must agree");
        problem.partials[i] = matrix(partial, "tree_sum: a partial");
        const auto [begin, count] = spans[i];
        check(begin == expected, "tree_sum: span ", i, " begins at shard ", begin, "; ", expected,
              " would be right: sorted, without gap or overlap");
        check(count > 0 && (count & (count - 1)) == 0 && begin % count == 0, "tree_sum: span ", i, " is (", begin, ", ",
              count, "); a power of two of shards that begins at a multiple of itself would be right");
        expected = begin + count;
        leaves.push_back(count);
    }
    if ((problem.type == DeviceType::f64) != (problem.out_type == DeviceType::f64))
        throw py::type_error("tree_sum: out has type " + out.type + " and the partials " +
                             (problem.type == DeviceType::f64 ? "f8" : "f4") +
                             "; one type, or float32 into 16 bits, would be right");
    plan(leaves, problem);
    tree_sum(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_tree_sum(py::module_& module) {
    module.def("tree_sum", &sum);
}

}  // namespace fivedp
