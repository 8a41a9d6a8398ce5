// Attention on NumPy arrays: arguments are checked here, then the GIL is released for the arithmetic.
// bfloat16 arrives as a view of uint16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.hpp"
#include "cpu/attention_driver.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

constexpr std::int64_t largest_size = 1024;

ElementType type_of(const py::array& array, const char* argument) {
    const py::dtype dtype = array.dtype();
    const char order = dtype.byteorder();
    if (order == '=' || order == '|') {
        if (dtype.kind() == 'f' && dtype.itemsize() == 4) return ElementType::f32;
        if (dtype.kind() == 'f' && dtype.itemsize() == 8) return ElementType::f64;
        if (dtype.kind() == 'u' && dtype.itemsize() == 2) return ElementType::bf16;
    }
    throw py::type_error(std::string("attention: ") + argument + " is " + py::str(dtype).cast<std::string>() +
                         "; float32, float64 or bfloat16 in the machine's byte order would be right");
}

std::string shape_of(const py::array& array) {
    std::ostringstream text;
    text << "(";
    for (py::ssize_t i = 0; i < array.ndim(); ++i) text << (i ? ", " : "") << array.shape(i);
    text << ")";
    return text.str();
}

TokenView tokens(const py::array& array, ElementType type, const char* argument) {
    check(array.ndim() == 4, "attention: ", argument, " has shape ", shape_of(array),
          "; (batch, tokens, heads, size) would be right");
    check(type_of(array, argument) == type, "attention: ", argument,
          " is of another type than q; one type would be right");
    check(array.size() == 0 || array.shape(3) == 1 || array.strides(3) == array.itemsize(),
          "attention: the last dimension of ", argument, " is strided; a contiguous one would be right");
    return {static_cast<char*>(const_cast<void*>(array.data())), array.strides(0), array.strides(1), array.strides(2)};
}

void check_shape(const py::array& array, const std::vector<std::int64_t>& shape, const char* argument) {
    bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (std::size_t i = 0; same && i < shape.size(); ++i) same = array.shape(static_cast<py::ssize_t>(i)) == shape[i];
    std::ostringstream wanted;
    for (std::size_t i = 0; i < shape.size(); ++i) wanted << (i ? ", " : "") << shape[i];
    check(same, "attention: ", argument, " has shape ", shape_of(array), "; (", wanted.str(), ") would be right");
}

// An array of sums: contiguous, float64 for float64 and else float32.
void* sums(const py::array& array, const std::vector<std::int64_t>& shape, ElementType type, const char* argument) {
    check_shape(array, shape, argument);
    check(type_of(array, argument) == (type == ElementType::f64 ? ElementType::f64 : ElementType::f32),
          "attention: ", argument, " is not of the type of sums; float64 for float64 and else float32 would be right");
    check((array.flags() & py::array::c_style) != 0, "attention: ", argument,
          " is strided; a contiguous array would be right");
    return const_cast<void*>(array.data());
}

// The same for an array that is written.
void* written(const py::array& array, const std::vector<std::int64_t>& shape, ElementType type, const char* argument) {
    check(array.writeable(), "attention: ", argument, " is read-only; a writeable array would be right");
    return sums(array, shape, type, argument);
}

const std::int32_t* places(const py::object& object, std::int64_t count, const char* argument) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array>(object))
        throw py::type_error(std::string("attention: ") + argument + " is no array; one of int32 would be right");
    const py::array array = py::reinterpret_borrow<py::array>(object);
    const char order = array.dtype().byteorder();
    check(array.dtype().kind() == 'i' && array.itemsize() == 4 && (order == '=' || order == '|') &&
              (array.flags() & py::array::c_style) != 0,
          "attention: ", argument, " is not contiguous int32 in the machine's byte order, which would be right");
    check_shape(array, {count}, argument);
    return static_cast<const std::int32_t*>(array.data());
}

// The mask, the scale and what bends the logits.
struct Mask {
    py::object q_position, k_position, q_document, k_document;
    double scale;
    bool causal;
    std::int64_t window;
    double softcap;
    std::vector<double> slopes;
};

Mask mask_of(const py::tuple& mask) {
    check(mask.size() == 9, "attention: the mask has ", mask.size(), " entries; 9 would be right");
    Mask result{mask[0],
                mask[1],
                mask[2],
                mask[3],
                mask[4].cast<double>(),
                mask[5].cast<bool>(),
                mask[6].cast<std::int64_t>(),
                mask[7].cast<double>(),
                {}};
    if (!mask[8].is_none()) result.slopes = mask[8].cast<std::vector<double>>();
    return result;
}

AttentionProblem problem_of(const py::array& q, const py::array& k, const py::array& v, const Mask& mask) {
    AttentionProblem problem{};
    problem.type = type_of(q, "q");
    problem.q = tokens(q, problem.type, "q");
    problem.k = tokens(k, problem.type, "k");
    problem.v = tokens(v, problem.type, "v");
    problem.batch = q.shape(0);
    problem.n_queries = q.shape(1);
    problem.heads = q.shape(2);
    problem.size = q.shape(3);
    problem.n_keys = k.shape(1);
    problem.kv_heads = k.shape(2);
    problem.v_size = v.shape(3);
    check_shape(k, {problem.batch, problem.n_keys, problem.kv_heads, problem.size}, "k");
    check_shape(v, {problem.batch, problem.n_keys, problem.kv_heads, problem.v_size}, "v");
    check(problem.kv_heads > 0 && problem.heads > 0 && problem.heads % problem.kv_heads == 0, "attention: q has ",
          problem.heads, " heads and k has ", problem.kv_heads, "; a multiple would be right");
    check(problem.size >= 1 && problem.v_size >= 1 && problem.size <= largest_size && problem.v_size <= largest_size,
          "attention: the head sizes are ", problem.size, " and ", problem.v_size, "; 1 to ", largest_size,
          " would be right");
    problem.q_position = places(mask.q_position, problem.n_queries, "q_position");
    problem.k_position = places(mask.k_position, problem.n_keys, "k_position");
    check(problem.q_position != nullptr && problem.k_position != nullptr,
          "attention: positions are missing; one of every token would be right");
    problem.q_document = places(mask.q_document, problem.n_queries, "q_document");
    problem.k_document = places(mask.k_document, problem.n_keys, "k_document");
    check((problem.q_document == nullptr) == (problem.k_document == nullptr),
          "attention: documents are given for queries or keys only; both or neither would be right");
    problem.scale = mask.scale;
    problem.causal = mask.causal;
    check(mask.window >= 0, "attention: window is ", mask.window, "; 0 (none) or more would be right");
    problem.window = mask.window;
    check(mask.softcap >= 0, "attention: softcap is ", mask.softcap, "; 0 (none) or more would be right");
    problem.softcap = mask.softcap;
    check(mask.slopes.empty() || static_cast<std::int64_t>(mask.slopes.size()) == problem.heads,
          "attention: there are ", mask.slopes.size(), " slopes for ", problem.heads, " heads; one each is right");
    problem.slopes = mask.slopes.empty() ? nullptr : mask.slopes.data();
    return problem;
}

// `get` is `sums` or `written`.
template <class Get>
void set_state(AttentionProblem& problem, const py::array& highest, const py::array& total, const py::array& output,
               const Get& get) {
    const std::vector<std::int64_t> rows = {problem.batch, problem.heads, problem.n_queries};
    problem.highest = get(highest, rows, problem.type, "highest");
    problem.total = get(total, rows, problem.type, "total");
    problem.output =
        get(output, {problem.batch, problem.n_queries, problem.heads, problem.v_size}, problem.type, "output");
}

// Whether two problems bend their logits alike.
bool same_mask(const AttentionProblem& one, const AttentionProblem& other) {
    return one.scale == other.scale && one.causal == other.causal && one.window == other.window &&
           one.softcap == other.softcap && (one.slopes == nullptr) == (other.slopes == nullptr) &&
           (one.slopes == nullptr || std::equal(one.slopes, one.slopes + one.heads, other.slopes));
}

// Whether two blocks of keys can be added to the state of the same queries in one go, and two blocks of queries to the
// gradients of the same keys.
bool same_queries(const AttentionProblem& one, const AttentionProblem& other) {
    return one.kv_heads == other.kv_heads && one.q_position == other.q_position && one.q_document == other.q_document &&
           same_mask(one, other);
}
bool same_keys(const AttentionProblem& one, const AttentionProblem& other) {
    return one.heads == other.heads && one.k_position == other.k_position && one.k_document == other.k_document &&
           same_mask(one, other);
}

// The problems of a call, one for each block, each of which knows the next; `problem_of_block` takes a block and its
// mask. The slopes lie in the masks.
template <class Block, class ProblemOfBlock>
std::vector<AttentionProblem> linked(const std::vector<Block>& blocks, const std::vector<Mask>& masks,
                                     const ProblemOfBlock& problem_of_block) {
    std::vector<AttentionProblem> problems;
    for (std::size_t i = 0; i < blocks.size(); ++i) problems.push_back(problem_of_block(blocks[i], masks[i]));
    for (std::size_t i = 1; i < problems.size(); ++i) problems[i - 1].next = &problems[i];
    return problems;
}

// Of blocks that are tuples whose third entry is the mask.
template <class Block>
std::vector<Mask> masks_of(const std::vector<Block>& blocks, const char* what) {
    check(!blocks.empty(), "attention: there is no block of ", what, "; one or more would be right");
    std::vector<Mask> masks;
    for (const auto& block : blocks) masks.push_back(mask_of(std::get<2>(block)));
    return masks;
}

using KeyBlock = std::tuple<py::array, py::array, py::tuple>;  // k, v, mask

void forward(const py::array& q, const std::vector<KeyBlock>& blocks, const py::array& highest, const py::array& total,
             const py::array& output) {
    const std::vector<Mask> masks = masks_of(blocks, "keys");
    const std::vector<AttentionProblem> problems = linked(blocks, masks, [&](const KeyBlock& block, const Mask& mask) {
        AttentionProblem problem = problem_of(q, std::get<0>(block), std::get<1>(block), mask);
        set_state(problem, highest, total, output, written);
        return problem;
    });
    for (std::size_t i = 1; i < problems.size(); ++i)
        check(same_queries(problems[0], problems[i]), "attention: block ", i,
              " has other heads, or another mask for the same queries, than block 0; other keys alone would be right");
    py::gil_scoped_release release;
    run_attention_forward(problems[0]);
}

// The shape of a state, without keys.
AttentionProblem problem_of_output(const py::array& output) {
    AttentionProblem problem{};
    problem.type = type_of(output, "out");
    check(output.ndim() == 4, "attention: out has shape ", shape_of(output),
          "; (batch, tokens, heads, size) would be right");
    problem.batch = output.shape(0);
    problem.n_queries = output.shape(1);
    problem.heads = output.shape(2);
    problem.v_size = output.shape(3);
    return problem;
}

void finish(const py::array& highest, const py::array& total, const py::array& state, const py::array& out,
            const py::array& log_sum) {
    AttentionProblem problem = problem_of_output(out);
    check(out.writeable(), "attention: out is read-only; a writeable array would be right");
    set_state(problem, highest, total, state, sums);
    const TokenView view = tokens(out, problem.type, "out");
    void* const sum = written(log_sum, {problem.batch, problem.heads, problem.n_queries}, problem.type, "log_sum");
    py::gil_scoped_release release;
    finish_attention(problem, view, sum);
}

void delta(const py::array& d_out, const py::array& out, const py::array& result) {
    AttentionProblem problem = problem_of_output(out);
    const TokenView view = tokens(out, problem.type, "out");
    problem.d_out = tokens(d_out, problem.type, "d_out");
    check_shape(d_out, {problem.batch, problem.n_queries, problem.heads, problem.v_size}, "d_out");
    void* const to = written(result, {problem.batch, problem.heads, problem.n_queries}, problem.type, "delta");
    py::gil_scoped_release release;
    attention_delta(problem, view, to);
}

using QueryBlock = std::tuple<py::array, py::array, py::tuple, py::array, py::array, py::array>;

// Each block of queries is d_out, q, mask, log_sum, delta, d_q.
void backward(const std::vector<QueryBlock>& blocks, const py::array& k, const py::array& v, const py::array& d_k,
              const py::array& d_v) {
    const std::vector<Mask> masks = masks_of(blocks, "queries");
    const auto problem_of_block = [&](const QueryBlock& block, const Mask& bends) {
        const auto& [d_out, q, mask, log_sum, delta_array, d_q] = block;
        AttentionProblem problem = problem_of(q, k, v, bends);
        problem.d_out = tokens(d_out, problem.type, "d_out");
        check_shape(d_out, {problem.batch, problem.n_queries, problem.heads, problem.v_size}, "d_out");
        const std::vector<std::int64_t> rows = {problem.batch, problem.heads, problem.n_queries};
        problem.log_sum = sums(log_sum, rows, problem.type, "log_sum");
        problem.delta = sums(delta_array, rows, problem.type, "delta");
        const std::vector<std::int64_t> shape = {problem.batch, problem.n_queries, problem.heads, problem.size};
        problem.d_q = written(d_q, shape, problem.type, "d_q");
        problem.d_k =
            written(d_k, {problem.batch, problem.n_keys, problem.kv_heads, problem.size}, problem.type, "d_k");
        problem.d_v =
            written(d_v, {problem.batch, problem.n_keys, problem.kv_heads, problem.v_size}, problem.type, "d_v");
        return problem;
    };
    const std::vector<AttentionProblem> problems = linked(blocks, masks, problem_of_block);
    for (std::size_t i = 1; i < problems.size(); ++i)
        check(same_keys(problems[0], problems[i]), "attention: block ", i,
              " has other heads, or another mask for the same keys, than block 0; other queries alone would be right");
    py::gil_scoped_release release;
    run_attention_backward(problems[0]);
}

}  // namespace

void bind_attention(py::module_& module) {
    module.def("attention_forward", &forward);
    module.def("attention_finish", &finish);
    module.def("attention_delta", &delta);
    module.def("attention_backward", &backward);
}

}  // namespace fivedp
