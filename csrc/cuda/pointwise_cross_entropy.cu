// Softmax cross-entropy from logits, with label smoothing, z-loss and an ignored label; also of a vocabulary that is
// split over ranks.
//
// Forward: each thread keeps the largest logit so far and the sum of exponentials relative to it (online softmax,
// Milakov & Gimelshein 2018, arXiv:1805.02867), rescaled once for every 16 bytes of logits; the row's largest and its
// sums are then taken in a fixed tree. Four loads of a thread are under way at a time. Bytes: the logits once. Rows are
// shared among warps as in cuda/rows.cuh; a row of any length takes the same registers.
// Backward: p = exp(logit - log_sum_exp) element by element; the logits are read once and the gradient written once,
// over the logits where that is wanted. About 3 FLOPs and one exponential an element each way.
#include "cuda/pointwise_cross_entropy.hpp"

#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int loads_together = 4;

FIVEDP_HOST_DEVICE float minus_infinity(float) {
    return -INFINITY;
}
FIVEDP_HOST_DEVICE double minus_infinity(double) {
    return -static_cast<double>(INFINITY);
}
// exp(x), with x * log2(e) rounded once: the relative error is |x| + 2 units.
FIVEDP_DEVICE float exp_quickly(float x) {
    return fast_exp2(x * 1.4426950408889634f);
}
FIVEDP_DEVICE double exp_quickly(double x) {
    return exp(x);
}

// What is known of a row of logits.
template <class S>
struct RowState {
    S largest, exponentials, of_label, total;
};

template <class S>
FIVEDP_DEVICE void finish_row(const RowState<S>& state, std::int64_t row, std::int64_t label,
                              const CrossEntropyTerms& terms, void* loss, void* log_sum_exp) {
    const S l = state.largest + log(state.exponentials), smoothing = static_cast<S>(terms.label_smoothing);
    if (log_sum_exp != nullptr) static_cast<S*>(log_sum_exp)[row] = l;
    S value = l - (S(1) - smoothing) * state.of_label;
    if (terms.label_smoothing != 0) value -= smoothing * (state.total / static_cast<S>(terms.vocabulary));
    if (terms.z_loss != 0) value += static_cast<S>(terms.z_loss) * l * l;
    if (label < 0 || label >= terms.vocabulary) value = bits_as_float(0x7fc00000u);
    if (label == terms.ignored) value = S(0);
    if (loss != nullptr) static_cast<S*>(loss)[row] = value;
}

template <class T>
FIVEDP_KERNEL(row_threads, 2)
cross_entropy_rows(CrossEntropyProblem p, int warps, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    S* const room = reinterpret_cast<S*>(dynamic_shared());
    const RowPlace place = row_place(warps);
    const std::int64_t row = block_x() * (row_warps / warps) + place.row;
    const std::int64_t columns = row < p.rows ? p.columns : 0;  // a row that is not there takes part in the sums
    const T* const logits = static_cast<const T*>(p.logits) + row * p.stride;
    const std::int64_t step = n * place.threads;
    const S lowest = minus_infinity(S(0));
    S largest = lowest, sums[2] = {0, 0};  // of exponentials, of logits
    for (std::int64_t base = n * place.thread; base < columns; base += loads_together * step) {
        Elements<T, n> loaded[loads_together];
        FIVEDP_UNROLL
        for (int i = 0; i < loads_together; ++i) loaded[i] = load_elements<n>(logits, base + i * step, columns, wide);
        FIVEDP_UNROLL
        for (int i = 0; i < loads_together; ++i) {
            S values[n], larger = largest;
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) {
                const bool there = base + i * step + e < columns;
                values[e] = there ? to_float(loaded[i].at[e]) : lowest;
                larger = values[e] > larger ? values[e] : larger;
                sums[1] += there ? values[e] : S(0);
            }
            // Where all are -infinity, so is the largest, and differences would be NaN.
            const S shift = larger == lowest ? S(0) : larger;
            sums[0] *= exp_quickly(largest - shift);
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) sums[0] += exp_quickly(values[e] - shift);
            largest = larger;
        }
    }
    const S of_row = row_max(largest, warps, room);
    if (of_row != lowest) sums[0] *= exp_quickly(largest - of_row);
    row_sums(sums, warps, room);
    if (columns == 0 || place.thread != 0) return;
    const std::int64_t label = p.labels[row], here = label - p.first;
    const S of_label = here >= 0 && here < columns ? S(to_float(logits[here])) : S(0);
    if (p.partials != nullptr) {
        S* const to = static_cast<S*>(p.partials) + row;
        to[0] = of_row;
        to[p.rows] = sums[0];
        to[2 * p.rows] = of_label;
        to[3 * p.rows] = sums[1];
    } else {
        finish_row(RowState<S>{of_row, sums[0], of_label, sums[1]}, row, label, p.terms, p.loss, p.log_sum_exp);
    }
}

template <class S>
FIVEDP_KERNEL(row_threads, 2)
merge_rows(CrossEntropyMergeProblem p) {
    const std::int64_t row = block_x() * row_threads + thread();
    if (row >= p.rows) return;
    const S* const partials = static_cast<const S*>(p.partials) + row;
    const S lowest = minus_infinity(S(0));
    RowState<S> state{lowest, 0, 0, 0};
    for (std::int64_t rank = 0; rank < p.n_ranks; ++rank) {
        const S* const from = partials + 4 * rank * p.rows;
        const S largest = from[0] > state.largest ? from[0] : state.largest;
        const S shift = largest == lowest ? S(0) : largest;
        state.exponentials =
            state.exponentials * exp_quickly(state.largest - shift) + from[p.rows] * exp_quickly(from[0] - shift);
        state.largest = largest;
        state.of_label += from[2 * p.rows];
        state.total += from[3 * p.rows];
    }
    finish_row(state, row, p.labels[row], p.terms, p.loss, p.log_sum_exp);
}

template <class T>
FIVEDP_KERNEL(row_threads, 2)
cross_entropy_gradient_rows(CrossEntropyGradientProblem p, int warps, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    const RowPlace place = row_place(warps);
    const std::int64_t row = block_x() * (row_warps / warps) + place.row;
    if (row >= p.rows) return;
    const T* const logits = static_cast<const T*>(p.logits) + row * p.stride;
    T* const d_logits = static_cast<T*>(p.d_logits) + row * p.d_stride;
    const std::int64_t label = p.labels[row], here = label - p.first;
    const bool ignored = label == p.terms.ignored;
    const S l = static_cast<const S*>(p.log_sum_exp)[row], smoothing = static_cast<S>(p.terms.label_smoothing);
    S scale = static_cast<S>(p.scale);
    if (p.d_loss != nullptr) scale *= static_cast<const S*>(p.d_loss)[row];
    if (label < 0 || label >= p.terms.vocabulary) scale = bits_as_float(0x7fc00000u);
    const S of_softmax = scale * (S(1) + S(2) * static_cast<S>(p.terms.z_loss) * l);
    const S of_all = scale * (smoothing / static_cast<S>(p.terms.vocabulary)), of_label = scale * (S(1) - smoothing);
    for (std::int64_t first = n * place.thread; first < p.columns; first += n * place.threads) {
        const Elements<T, n> values = load_elements<n>(logits, first, p.columns, wide);
        Elements<T, n> result;
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            S gradient = of_softmax * exp_quickly(to_float(values.at[e]) - l) - of_all;
            if (first + e == here) gradient -= of_label;
            result.at[e] = from_float<T>(ignored ? S(0) : gradient);
        }
        store_elements<n>(d_logits, first, p.columns, wide, result);
    }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const int warps = warps_of_a_row(p.columns, piece<T>), groups = row_warps / warps;
        launch(cross_entropy_rows<T>, (p.rows + groups - 1) / groups, 1, 1, row_threads,
               static_cast<std::int64_t>(2 * row_warps * sizeof(Sum<T>)), stream, p, warps,
               lies_wide(p.logits, p.stride * static_cast<std::int64_t>(sizeof(T))));
    });
}

void cross_entropy_merge(const CrossEntropyMergeProblem& p, Stream stream) {
    const std::int64_t blocks = (p.rows + row_threads - 1) / row_threads;
    if (p.sum_type == DeviceType::f64)
        launch(merge_rows<double>, blocks, 1, 1, row_threads, 0, stream, p);
    else
        launch(merge_rows<float>, blocks, 1, 1, row_threads, 0, stream, p);
}

void cross_entropy_backward(const CrossEntropyGradientProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr std::int64_t size = sizeof(T);
        const int warps = warps_of_a_row(p.columns, piece<T>), groups = row_warps / warps;
        launch(cross_entropy_gradient_rows<T>, (p.rows + groups - 1) / groups, 1, 1, row_threads, 0, stream, p, warps,
               lies_wide(p.logits, p.stride * size) && lies_wide(p.d_logits, p.d_stride * size));
    });
}

}  // namespace fivedp
