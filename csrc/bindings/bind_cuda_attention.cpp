// Attention on device arrays: arguments are checked here, then kernels are started on the stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "bindings/device_arrays.hpp"
#include "cuda/attention.hpp"

namespace py = pybind11;

namespace fivedp {
namespace {

DeviceTokens tokens_of(const DeviceArray& array, const std::string& who) {
    check(array.shape.size() == 4, who, " has shape ", text_of(array.shape),
          "; (batch, tokens, heads, size) would be right");
    const std::int64_t item = array.item_size();
    check(array.size() == 0 || array.shape[3] == 1 || array.strides[3] == item, who,
          " is strided along its last dimension; a contiguous one would be right");
    DeviceTokens tokens{array.data, 0, 0, 0, reinterpret_cast<std::uintptr_t>(array.data) % 16 == 0};
    std::int64_t* const steps[] = {&tokens.batch, &tokens.token, &tokens.head};
    for (std::size_t d = 0; d < 3; ++d) {
        if (array.shape[d] <= 1) continue;
        check(array.strides[d] % item == 0, who, " has a stride of ", array.strides[d],
              " bytes; a multiple of its element's size would be right");
        *steps[d] = array.strides[d] / item;
        tokens.aligned = tokens.aligned && array.strides[d] % 16 == 0;
    }
    return tokens;
}

// Rows of tokens of a given type and shape.
DeviceTokens rows_of(const py::handle& object, DeviceType type, const std::vector<std::int64_t>& shape, bool written,
                     const std::string& who) {
    const DeviceArray array = device_array(object, who.c_str());
    if (number_type(array, who.c_str()) != type)
        throw py::type_error(who + " is of another type than the others; one type would be right");
    check(array.shape == shape, who, " has shape ", text_of(array.shape), "; ", text_of(shape), " would be right");
    check(!written || array.writeable, who, " is read-only; a writeable array would be right");
    return tokens_of(array, who);
}

void* sums(const py::handle& object, DeviceType type, const std::vector<std::int64_t>& shape, bool written,
           const char* who) {
    const DeviceArray array = device_array(object, who);
    expect(array, sum_type_of(type), shape, written, who);
    return array.data;
}

const std::int32_t* places(const py::handle& object, std::int64_t n, const char* who) {
    if (object.is_none()) return nullptr;
    const DeviceArray array = device_array(object, who);
    expect(array, "i4", {n}, false, who);
    return reinterpret_cast<const std::int32_t*>(array.data);
}

int as_int(std::int64_t count, const char* what) {
    check(count <= most_attention_tokens, "attention: there are ", count, " ", what, "; at most ",
          most_attention_tokens, " would be right");
    return static_cast<int>(count);
}

struct Shapes {
    std::vector<std::int64_t> q, k, v, out, rows;
};

// `mask` is Mask's tuple with its places and slopes in device memory; `spans` is int32 workspace.
DeviceAttention problem_of(const py::handle& q_object, const py::handle& k_object, const py::handle& v_object,
                           const py::tuple& mask, const py::handle& spans_object, Shapes& shapes) {
    const DeviceArray q = device_array(q_object, "attention: q"), k = device_array(k_object, "attention: k"),
                      v = device_array(v_object, "attention: v");
    DeviceAttention a{};
    a.type = number_type(q, "attention: q");
    a.q = tokens_of(q, "attention: q");
    tokens_of(k, "attention: k");
    tokens_of(v, "attention: v");
    const std::int64_t batch = q.shape[0], n_queries = q.shape[1], heads = q.shape[2], size = q.shape[3];
    const std::int64_t n_keys = k.shape[1], kv_heads = k.shape[2], v_size = v.shape[3];
    check(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "attention: q has ", heads, " heads and k has ", kv_heads,
          "; a multiple would be right");
    check(size >= 1 && v_size >= 1 && size <= largest_attention_size && v_size <= largest_attention_size,
          "attention: the head sizes are ", size, " and ", v_size, "; 1 to ", largest_attention_size,
          " would be right on a GPU");
    shapes = {q.shape,
              {batch, n_keys, kv_heads, size},
              {batch, n_keys, kv_heads, v_size},
              {batch, n_queries, heads, v_size},
              {batch, heads, n_queries}};
    a.k = rows_of(k_object, a.type, shapes.k, false, "attention: k");
    a.v = rows_of(v_object, a.type, shapes.v, false, "attention: v");
    a.n_queries = as_int(n_queries, "queries");
    a.n_keys = as_int(n_keys, "keys");
    as_int(batch * heads, "heads in the batch");
    a.batch = static_cast<int>(batch);
    a.heads = static_cast<int>(heads);
    a.kv_heads = static_cast<int>(kv_heads);
    a.size = static_cast<int>(size);
    a.v_size = static_cast<int>(v_size);

    check(mask.size() == 9, "attention: the mask has ", mask.size(), " entries; 9 would be right");
    a.q_position = places(mask[0], n_queries, "attention: q_position");
    a.k_position = places(mask[1], n_keys, "attention: k_position");
    check(a.q_position != nullptr && a.k_position != nullptr,
          "attention: positions are missing; one of every token would be right");
    a.q_document = places(mask[2], n_queries, "attention: q_document");
    a.k_document = places(mask[3], n_keys, "attention: k_document");
    check((a.q_document == nullptr) == (a.k_document == nullptr),
          "attention: documents are given for queries or keys only; both or neither would be right");
    a.scale = mask[4].cast<double>();
    a.causal = mask[5].cast<bool>();
    const std::int64_t window = mask[6].cast<std::int64_t>();
    check(window >= 0, "attention: window is ", window, "; 0 (none) or more would be right");
    a.window = static_cast<int>(std::min<std::int64_t>(window, std::numeric_limits<int>::max()));
    a.softcap = mask[7].cast<double>();
    check(a.softcap >= 0, "attention: softcap is ", a.softcap, "; 0 (none) or more would be right");
    if (!mask[8].is_none()) {
        const DeviceArray slopes = device_array(mask[8], "attention: slopes");
        expect(slopes, "f8", {heads}, false, "attention: slopes");
        a.slopes = reinterpret_cast<const double*>(slopes.data);
    }

    const std::int64_t q_tiles = (n_queries + attention_tile - 1) / attention_tile;
    const std::int64_t k_tiles = (n_keys + attention_tile - 1) / attention_tile;
    const DeviceArray spans = device_array(spans_object, "attention: spans");
    expect(spans, "i4", {q_tiles + k_tiles, 4}, true, "attention: spans");
    check(reinterpret_cast<std::uintptr_t>(spans.data) % 16 == 0,
          "attention: spans is not aligned; a multiple of 16 bytes would be right");
    a.q_spans = reinterpret_cast<TileSpan*>(spans.data);
    a.k_spans = a.q_spans + q_tiles;
    return a;
}

const char* forward(const py::object& q, const py::object& k, const py::object& v, const py::tuple& mask,
                    const py::object& spans, const py::object& highest, const py::object& total,
                    const py::object& output, bool hopper, std::uintptr_t stream) {
    Shapes shapes;
    DeviceAttention a = problem_of(q, k, v, mask, spans, shapes);
    a.highest = sums(highest, a.type, shapes.rows, true, "attention: highest");
    a.total = sums(total, a.type, shapes.rows, true, "attention: total");
    a.output = sums(output, a.type, shapes.out, true, "attention: output");
    return attention_forward(a, hopper, stream_of(stream));
}

const char* backward(const py::object& d_out, const py::object& q, const py::object& k, const py::object& v,
                     const py::tuple& mask, const py::object& spans, const py::object& log_sum, const py::object& delta,
                     const py::object& d_q, const py::object& d_k, const py::object& d_v, bool hopper,
                     std::uintptr_t stream) {
    Shapes shapes;
    DeviceAttention a = problem_of(q, k, v, mask, spans, shapes);
    a.d_out = rows_of(d_out, a.type, shapes.out, false, "attention: d_out");
    a.log_sum = sums(log_sum, a.type, shapes.rows, false, "attention: log_sum");
    a.delta = sums(delta, a.type, shapes.rows, false, "attention: delta");
    a.d_q = sums(d_q, a.type, shapes.q, true, "attention: d_q");
    a.d_k = sums(d_k, a.type, shapes.k, true, "attention: d_k");
    a.d_v = sums(d_v, a.type, shapes.v, true, "attention: d_v");
    return attention_backward(a, hopper, stream_of(stream));
}

AttentionRows rows_like(const DeviceArray& out, const char* who) {
    check(out.shape.size() == 4, who, " has shape ", text_of(out.shape),
          "; (batch, tokens, heads, size) would be right");
    return {DeviceType::f32, as_int(out.shape[0], "sequences"), as_int(out.shape[2], "heads"),
            as_int(out.shape[1], "queries"), as_int(out.shape[3], "elements of a head")};
}

AttentionState state_of(const py::tuple& state, const DeviceArray& like, DeviceType type, bool written) {
    check(state.size() == 3, "attention: a state has ", state.size(), " arrays; 3 would be right");
    const std::vector<std::int64_t> rows = {like.shape[0], like.shape[2], like.shape[1]};
    return {sums(state[0], type, rows, written, "attention: highest"),
            sums(state[1], type, rows, written, "attention: total"),
            sums(state[2], type, like.shape, written, "attention: output")};
}

void finish(const py::tuple& state, const py::object& out_object, const py::object& log_sum, std::uintptr_t stream) {
    const DeviceArray out = device_array(out_object, "attention: out");
    AttentionRows rows = rows_like(out, "attention: out");
    rows.type = number_type(out, "attention: out");
    const DeviceTokens to = rows_of(out_object, rows.type, out.shape, true, "attention: out");
    void* const sum = sums(log_sum, rows.type, {out.shape[0], out.shape[2], out.shape[1]}, true, "attention: log_sum");
    attention_finish(rows, state_of(state, out, rows.type, false), to, sum, stream_of(stream));
}

void join(const py::tuple& first, const py::tuple& second, const py::tuple& to, std::uintptr_t stream) {
    check(to.size() == 3, "attention: a state has ", to.size(), " arrays; 3 would be right");
    const DeviceArray output = device_array(to[2], "attention: output");
    AttentionRows rows = rows_like(output, "attention: output");
    rows.type = number_type(output, "attention: output");
    attention_join(rows, state_of(first, output, rows.type, false), state_of(second, output, rows.type, false),
                   state_of(to, output, rows.type, true), stream_of(stream));
}

void delta(const py::object& d_out, const py::object& out_object, const py::object& result, std::uintptr_t stream) {
    const DeviceArray out = device_array(out_object, "attention: out");
    AttentionRows rows = rows_like(out, "attention: out");
    rows.type = number_type(out, "attention: out");
    attention_delta(rows, rows_of(d_out, rows.type, out.shape, false, "attention: d_out"),
                    tokens_of(out, "attention: out"),
                    sums(result, rows.type, {out.shape[0], out.shape[2], out.shape[1]}, true, "attention: delta"),
                    stream_of(stream));
}

}  // namespace

void bind_cuda_attention(py::module_& module) {
    module.def("attention_forward", &forward);
    module.def("attention_backward", &backward);
    module.def("attention_finish", &finish);
    module.def("attention_join", &join);
    module.def("attention_delta", &delta);
}

}  // namespace fivedp
