// Cross-entropy on device arrays: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>

#include "bindings/device_arrays.hpp"
#include "cuda/pointwise_cross_entropy.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

CrossEntropyTerms terms_of(std::int64_t vocabulary, std::int64_t ignored, double label_smoothing, double z_loss) {
    check(label_smoothing >= 0 && label_smoothing <= 1, "cross_entropy: label_smoothing is ", label_smoothing,
          "; 0 to 1 would be right");
    return {vocabulary, ignored, label_smoothing, z_loss};
}

const std::int64_t* labels_of(const py::object& object, std::int64_t rows) {
    const DeviceArray labels = device_array(object, "cross_entropy: labels");
    expect(labels, "i8", {rows}, false, "cross_entropy: labels");
    return reinterpret_cast<const std::int64_t*>(labels.data);
}

char* vector_data(const py::object& object, const char* type, std::int64_t rows, bool written, const char* who) {
    const DeviceArray array = optional_array(object, who);
    if (!object.is_none()) expect(array, type, {rows}, written, who);
    return array.data;
}

DeviceArray logits_of(const py::object& object, std::int64_t first, std::int64_t vocabulary) {
    const DeviceArray logits = device_array(object, "cross_entropy: logits");
    check(logits.shape.size() == 2 && logits.shape[1] > 0, "cross_entropy: logits has shape ", text_of(logits.shape),
          "; (rows, classes) with one class or more would be right");
    check(first >= 0 && first + logits.shape[1] <= vocabulary, "cross_entropy: logits has classes ", first, " to ",
          first + logits.shape[1], " of a vocabulary of ", vocabulary, "; classes within it would be right");
    return logits;
}

void forward(const py::object& logits_object, const py::object& labels, const py::object& loss,
             const py::object& log_sum_exp, const py::object& partials_object, std::int64_t first,
             std::int64_t vocabulary, std::int64_t ignored, double label_smoothing, double z_loss,
             std::uintptr_t stream) {
    const DeviceArray logits = logits_of(logits_object, first, vocabulary);
    CrossEntropyProblem problem{};
    problem.type = number_type(logits, "cross_entropy: logits");
    problem.rows = logits.shape[0];
    problem.columns = logits.shape[1];
    problem.logits = logits.data;
    problem.stride = expect_rows(logits, logits.type, logits.shape, false, "cross_entropy: logits")[0];
    problem.labels = labels_of(labels, problem.rows);
    const char* const sums = sum_type_of(problem.type);
    problem.loss = vector_data(loss, sums, problem.rows, true, "cross_entropy: loss");
    problem.log_sum_exp = vector_data(log_sum_exp, sums, problem.rows, true, "cross_entropy: log_sum_exp");
    if (!partials_object.is_none()) {
        const DeviceArray partials = device_array(partials_object, "cross_entropy: partials");
        expect(partials, sums, {4, problem.rows}, true, "cross_entropy: partials");
        problem.partials = partials.data;
    }
    problem.first = first;
    problem.terms = terms_of(vocabulary, ignored, label_smoothing, z_loss);
    cross_entropy_forward(problem, stream_of(stream));
}

void merge(const py::object& partials_object, const py::object& labels, const py::object& loss,
           const py::object& log_sum_exp, std::int64_t vocabulary, std::int64_t ignored, double label_smoothing,
           double z_loss, std::uintptr_t stream) {
    const DeviceArray partials = device_array(partials_object, "cross_entropy: partials");
    CrossEntropyMergeProblem problem{};
    problem.sum_type = number_type(partials, "cross_entropy: partials");
    check(partials.shape.size() == 3 && partials.shape[0] > 0, "cross_entropy: partials has shape ",
          text_of(partials.shape), "; (ranks, 4, rows) would be right");
    problem.n_ranks = partials.shape[0];
    problem.rows = partials.shape[2];
    const char* const sums = sum_type_of(problem.sum_type);
    expect(partials, sums, {problem.n_ranks, 4, problem.rows}, false, "cross_entropy: partials");
    problem.partials = partials.data;
    problem.labels = labels_of(labels, problem.rows);
    problem.loss = vector_data(loss, sums, problem.rows, true, "cross_entropy: loss");
    problem.log_sum_exp = vector_data(log_sum_exp, sums, problem.rows, true, "cross_entropy: log_sum_exp");
    problem.terms = terms_of(vocabulary, ignored, label_smoothing, z_loss);
    cross_entropy_merge(problem, stream_of(stream));
}

void backward(const py::object& logits_object, const py::object& labels, const py::object& log_sum_exp,
              const py::object& d_loss, const py::object& d_logits_object, double scale, std::int64_t first,
              std::int64_t vocabulary, std::int64_t ignored, double label_smoothing, double z_loss,
              std::uintptr_t stream) {
    const DeviceArray logits = logits_of(logits_object, first, vocabulary);
    const DeviceArray d_logits = device_array(d_logits_object, "cross_entropy: d_logits");
    CrossEntropyGradientProblem problem{};
    problem.type = number_type(logits, "cross_entropy: logits");
    problem.rows = logits.shape[0];
    problem.columns = logits.shape[1];
    problem.logits = logits.data;
    problem.stride = expect_rows(logits, logits.type, logits.shape, false, "cross_entropy: logits")[0];
    problem.d_logits = d_logits.data;
    problem.d_stride = expect_rows(d_logits, logits.type, logits.shape, true, "cross_entropy: d_logits")[0];
    problem.labels = labels_of(labels, problem.rows);
    const char* const sums = sum_type_of(problem.type);
    check(!log_sum_exp.is_none(), "cross_entropy: log_sum_exp is None; what the forward wrote would be right");
    problem.log_sum_exp = vector_data(log_sum_exp, sums, problem.rows, false, "cross_entropy: log_sum_exp");
    problem.d_loss = vector_data(d_loss, sums, problem.rows, false, "cross_entropy: d_loss");
    problem.scale = scale;
    problem.first = first;
    problem.terms = terms_of(vocabulary, ignored, label_smoothing, z_loss);
    cross_entropy_backward(problem, stream_of(stream));
}

}  // namespace

void bind_cuda_cross_entropy(py::module_& module) {
    module.def("cross_entropy_forward", &forward);
    module.def("cross_entropy_merge", &merge);
    module.def("cross_entropy_backward", &backward);
}

}  // namespace fivedp
