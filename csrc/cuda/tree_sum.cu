// The sum of partial products over aligned spans of virtual shards, in the tree of one product over all shards (see
// csrc/cpu/tree_sum.hpp): every product and sum is rounded by itself, so float32 and float64 results have the CPU's
// bits.
//
// A thread has 16 bytes of elements and goes through the partials. They are folded as a binary counter: what has come
// last is in registers, the sums that wait for their other half in shared memory, 16 bytes a thread each, where a warp
// meets no bank twice. How many sums a partial joins is known before the launch. Four partials are loaded at a time,
// so that their latencies overlap. Bytes: every partial read once, out written once (and read where beta is not 0).
//
// Where all arrays are contiguous they count as one row; else each element has its own address.
#include "cuda/tree_sum.hpp"

#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int loads_together = 4;

// `flat`: contiguous, so element i of all arrays is i elements behind their beginning.
template <class S, class Out>
FIVEDP_KERNEL(row_threads, 2)
tree_sum_elements(DeviceTreeSumProblem p, std::int64_t n_elements, bool flat, bool wide) {
    constexpr int n = piece<S>;
    using Values = Elements<S, n>;
    Values* const waiting = reinterpret_cast<Values*>(dynamic_shared()) + thread();
    const std::int64_t begin = n * (block_x() * row_threads + thread());
    if (begin >= n_elements) return;

    // Where element e of this thread lies in an array, in elements.
    const auto offset = [&](const DeviceMatrix& array, int e) {
        const std::int64_t at = begin + e, row = at / p.columns;
        return row / p.rows * array.batch_stride + row % p.rows * array.row_stride +
               at % p.columns * array.column_stride;
    };
    const auto load = [&](const DeviceMatrix& array) {
        const S* const data = reinterpret_cast<const S*>(array.data);
        if (flat) return load_elements<n>(data, begin, n_elements, wide);
        Values values;
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) values.at[e] = begin + e < n_elements ? data[offset(array, e)] : S(0);
        return values;
    };
    const auto add = [](const Values& left, const Values& right) {
        Values sum;
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) sum.at[e] = rounded_sum(left.at[e], right.at[e]);
        return sum;
    };

    Values last{};
    int open = 0;
    for (int first = 0; first < p.n_partials; first += loads_together) {
        Values next[loads_together];
        FIVEDP_UNROLL
        for (int i = 0; i < loads_together; ++i)
            if (first + i < p.n_partials) next[i] = load(p.partials[first + i]);
        FIVEDP_UNROLL
        for (int i = 0; i < loads_together; ++i) {
            if (first + i >= p.n_partials) continue;
            if (first + i > 0) waiting[row_threads * open++] = last;
            last = next[i];
            for (int joins = p.joins[first + i]; joins > 0; --joins) last = add(waiting[row_threads * --open], last);
        }
    }

    const S alpha = static_cast<S>(p.alpha), beta = static_cast<S>(p.beta);
    Out* const out = reinterpret_cast<Out*>(p.out.data);
    Elements<Out, n> result;
    if (p.beta != 0 && flat) result = load_elements<n>(static_cast<const Out*>(out), begin, n_elements, wide);
    FIVEDP_UNROLL
    for (int e = 0; e < n; ++e) {
        S value = alpha != S(1) ? rounded_product(alpha, last.at[e]) : last.at[e];
        if (p.beta != 0 && begin + e < n_elements) {
            const S old = to_float(flat ? result.at[e] : out[offset(p.out, e)]);
            value = rounded_sum(value, rounded_product(beta, old));
        }
        result.at[e] = from_float<Out>(value);
        if (!flat && begin + e < n_elements) out[offset(p.out, e)] = result.at[e];
    }
    if (flat) store_elements<n>(out, begin, n_elements, wide, result);
}

bool contiguous(const DeviceMatrix& array, const DeviceTreeSumProblem& p) {
    return (p.columns == 1 || array.column_stride == 1) && (p.rows == 1 || array.row_stride == p.columns) &&
           (p.batch == 1 || array.batch_stride == p.rows * p.columns);
}

template <class S, class Out>
void start(const DeviceTreeSumProblem& p, Stream stream) {
    const std::int64_t n_elements = p.batch * p.rows * p.columns;
    bool flat = contiguous(p.out, p), wide = lies_wide(p.out.data, 0);
    for (int i = 0; i < p.n_partials; ++i) {
        flat = flat && contiguous(p.partials[i], p);
        wide = wide && lies_wide(p.partials[i].data, 0);
    }
    const std::int64_t per_block = row_threads * piece<S>;
    launch(tree_sum_elements<S, Out>, (n_elements + per_block - 1) / per_block, 1, 1, row_threads,
           static_cast<std::int64_t>(p.depth) * row_threads * 16, stream, p, n_elements, flat, wide);
}

}  // namespace

void tree_sum(const DeviceTreeSumProblem& p, Stream stream) {
    if (p.type == DeviceType::f64) return start<double, double>(p, stream);
    if (p.out_type == DeviceType::bf16) return start<float, Bf16>(p, stream);
    if (p.out_type == DeviceType::f16) return start<float, Half>(p, stream);
    start<float, float>(p, stream);
}

}  // namespace fivedp
