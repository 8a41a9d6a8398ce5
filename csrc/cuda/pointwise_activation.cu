// What lies between an expert's two products: the activation, and its gradient together with that of the combine
// weight. One pass over memory; everything is computed in the type of sums and rounded where it is stored.
//
// Rows are shared among warps as in cuda/rows.cuh; a thread has 16 bytes of each array at a time. The dot product
// <d_hidden, hidden> is a chain of fused multiply-adds over a thread's elements, in rising order, then the tree of
// `row_sums`: the same bits on every chip and for every alignment. Bytes of the gated backward in 16 bits: 3 reads and
// 3 writes of 2 bytes an element; about 40 instructions, so that memory is what it waits for.
#include "cuda/pointwise_activation.hpp"

#include "cuda/activations.cuh"
#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

template <class T>
FIVEDP_KERNEL(row_threads, 2)
activation_rows(DeviceActivationProblem p, int warps, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    const RowPlace place = row_place(warps);
    const std::int64_t row = block_x() * (row_warps / warps) + place.row;
    if (row >= p.rows) return;
    const bool gated = p.gate != nullptr;
    const T* const gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* const up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* const hidden = static_cast<T*>(p.hidden) + row * p.hidden_stride;
    const Activation activation = p.activation;
    for (std::int64_t first = n * place.thread; first < p.columns; first += n * place.threads) {
        const Elements<T, n> u = load_elements<n>(up, first, p.columns, wide);
        Elements<T, n> g = u, result;
        if (gated) g = load_elements<n>(gate, first, p.columns, wide);
        S value[n], slope[n];
        activate_all(activation, g.at, value, slope);
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) result.at[e] = from_float<T>(S(gated ? value[e] * to_float(u.at[e]) : value[e]));
        store_elements<n>(hidden, first, p.columns, wide, result);
    }
}

template <class T, class Incoming>
FIVEDP_KERNEL(row_threads, 2)
activation_gradient_rows(DeviceActivationGradientProblem p, int warps, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    S* const room = reinterpret_cast<S*>(dynamic_shared());
    const RowPlace place = row_place(warps);
    const std::int64_t row = block_x() * (row_warps / warps) + place.row;
    const std::int64_t columns = row < p.rows ? p.columns : 0;  // a row that is not there takes part in the sums
    const bool gated = p.gate != nullptr;
    const Incoming* const d_hidden = static_cast<const Incoming*>(p.d_hidden) + row * p.d_hidden_stride;
    const T* const gate = static_cast<const T*>(p.gate) + row * p.gate_stride;
    const T* const up = static_cast<const T*>(p.up) + row * p.up_stride;
    T* const d_gate = static_cast<T*>(p.d_gate) + row * p.d_gate_stride;
    T* const d_up = static_cast<T*>(p.d_up) + row * p.d_up_stride;
    T* const hidden_weighted = static_cast<T*>(p.hidden_weighted) + row * p.hidden_weighted_stride;
    const Activation activation = p.activation;
    const S weight = p.weights != nullptr && columns > 0 ? static_cast<const S*>(p.weights)[row] : S(1);
    S dot[1] = {0};
    for (std::int64_t first = n * place.thread; first < columns; first += n * place.threads) {
        const Elements<Incoming, n> d = load_elements<n>(d_hidden, first, columns, wide);
        const Elements<T, n> u = load_elements<n>(up, first, columns, wide);
        Elements<T, n> g = u, to_gate, to_up, weighted;
        if (gated) g = load_elements<n>(gate, first, columns, wide);
        S value[n], slope[n];
        activate_all(activation, g.at, value, slope);
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            const S incoming = to_float(d.at[e]), outgoing = weight * incoming, factor = to_float(u.at[e]);
            // As the second product read it.
            const S hidden = to_float(from_float<T>(S(gated ? value[e] * factor : value[e])));
            to_gate.at[e] = from_float<T>(S(outgoing * factor * slope[e]));
            to_up.at[e] = from_float<T>(S(outgoing * (gated ? value[e] : slope[e])));
            weighted.at[e] = from_float<T>(S(weight * hidden));
            if (first + e < columns) dot[0] = fma(incoming, hidden, dot[0]);
        }
        if (gated) store_elements<n>(d_gate, first, columns, wide, to_gate);
        store_elements<n>(d_up, first, columns, wide, to_up);
        if (p.hidden_weighted != nullptr) store_elements<n>(hidden_weighted, first, columns, wide, weighted);
    }
    if (p.d_weights == nullptr) return;
    row_sums(dot, warps, room);
    if (row < p.rows && place.thread == 0) static_cast<S*>(p.d_weights)[row] = dot[0];
}

template <class T, class Incoming>
void start_gradient(const DeviceActivationGradientProblem& p, Stream stream) {
    constexpr std::int64_t size = sizeof(T);
    const int warps = warps_of_a_row(p.columns, piece<T>), groups = row_warps / warps;
    const bool wide = lies_wide(p.d_hidden, p.d_hidden_stride * static_cast<std::int64_t>(sizeof(Incoming))) &&
                      lies_wide(p.gate, p.gate_stride * size) && lies_wide(p.up, p.up_stride * size) &&
                      lies_wide(p.d_gate, p.d_gate_stride * size) && lies_wide(p.d_up, p.d_up_stride * size) &&
                      lies_wide(p.hidden_weighted, p.hidden_weighted_stride * size);
    launch(activation_gradient_rows<T, Incoming>, (p.rows + groups - 1) / groups, 1, 1, row_threads,
           static_cast<std::int64_t>(row_warps * sizeof(Sum<T>)), stream, p, warps, wide);
}

}  // namespace

void activation_forward(const DeviceActivationProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr std::int64_t size = sizeof(T);
        const int warps = warps_of_a_row(p.columns, piece<T>), groups = row_warps / warps;
        const bool wide = lies_wide(p.gate, p.gate_stride * size) && lies_wide(p.up, p.up_stride * size) &&
                          lies_wide(p.hidden, p.hidden_stride * size);
        launch(activation_rows<T>, (p.rows + groups - 1) / groups, 1, 1, row_threads, 0, stream, p, warps, wide);
    });
}

void activation_backward(const DeviceActivationGradientProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (p.d_hidden_type == p.type)
            start_gradient<T, T>(p, stream);
        else
            start_gradient<T, Sum<T>>(p, stream);
    });
}

}  // namespace fivedp
