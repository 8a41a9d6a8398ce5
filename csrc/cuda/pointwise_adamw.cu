// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with master weights and moments in the type of sums, and the
// squared norm of gradients that clipping needs.
//
// A thread has 16 bytes of each of master, m and v, and the same elements of gradient and parameter: with 16-bit
// parameters and gradients 14 bytes are read and 14 written for each element (16 where the gradient is zeroed as well),
// with about 20 instructions. Bias corrections come as numbers from the host; the gradient's scale may be one number in
// device memory, so that clipping waits for nothing. A scale that is not finite (a gradient overflowed) leaves
// parameter, master and moments as they are.
//
// The squared norm is summed in double, which neither overflows nor depends on the order much; the order is fixed
// nonetheless: a thread adds the pieces of its block that lie a block apart, then a tree; a second kernel of one block
// adds the blocks' sums. How many blocks there are is a function of n.
#include "cuda/pointwise_adamw.hpp"

#include <algorithm>

#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

template <class P, class G>
FIVEDP_KERNEL(row_threads, 2)
adamw_elements(AdamwProblem p, bool wide) {
    using S = Sum<P>;
    constexpr int n = piece<S>;
    const std::int64_t first = n * (block_x() * row_threads + thread());
    if (first >= p.n) return;
    S scale = static_cast<S>(p.factor);
    if (p.scale != nullptr) scale *= *static_cast<const S*>(p.scale);
    G* const gradient = static_cast<G*>(p.gradient);
    if (isfinite(scale)) {
        S* const master = static_cast<S*>(p.master);
        S* const first_moment = static_cast<S*>(p.first_moment);
        S* const second_moment = static_cast<S*>(p.second_moment);
        const Elements<G, n> gradients = load_elements<n>(static_cast<const G*>(gradient), first, p.n, wide);
        Elements<S, n> w = load_elements<n>(static_cast<const S*>(master), first, p.n, wide);
        Elements<S, n> m = load_elements<n>(static_cast<const S*>(first_moment), first, p.n, wide);
        Elements<S, n> v = load_elements<n>(static_cast<const S*>(second_moment), first, p.n, wide);
        const S beta1 = static_cast<S>(p.beta1), beta2 = static_cast<S>(p.beta2), epsilon = static_cast<S>(p.epsilon);
        const S rest1 = static_cast<S>(1 - p.beta1), rest2 = static_cast<S>(1 - p.beta2);
        const S keep = static_cast<S>(p.keep), step_size = static_cast<S>(p.step_size), root = static_cast<S>(p.root);
        Elements<P, n> rounded;
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            const S g = scale * S(to_float(gradients.at[e]));
            m.at[e] = beta1 * m.at[e] + rest1 * g;
            v.at[e] = beta2 * v.at[e] + rest2 * (g * g);
            w.at[e] = keep * w.at[e] - step_size * (m.at[e] / (sqrt(v.at[e]) * root + epsilon));
            rounded.at[e] = from_float<P>(w.at[e]);
        }
        store_elements<n>(master, first, p.n, wide, w);
        store_elements<n>(first_moment, first, p.n, wide, m);
        store_elements<n>(second_moment, first, p.n, wide, v);
        if (p.parameter != nullptr) store_elements<n>(static_cast<P*>(p.parameter), first, p.n, wide, rounded);
    }
    if (p.zero_gradient) store_elements<n>(gradient, first, p.n, wide, Elements<G, n>{});
}

// Pieces that a block of squared_norm goes through where there are not more of them than blocks can be.
constexpr std::int64_t elements_of_a_block = 32 * 1024, most_blocks = 1024;

template <class T>
FIVEDP_KERNEL(row_threads, 2)
square_elements(SquaredNormProblem p, bool wide) {
    constexpr int n = piece<T>;
    double* const room = reinterpret_cast<double*>(dynamic_shared());
    const T* const x = static_cast<const T*>(p.x);
    double sum[1] = {0};
    for (std::int64_t first = n * (block_x() * row_threads + thread()); first < p.n;
         first += n * blocks_x() * row_threads) {
        const Elements<T, n> values = load_elements<n>(x, first, p.n, wide);
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            const double value = static_cast<double>(to_float(values.at[e]));
            sum[0] = fma(value, value, sum[0]);
        }
    }
    row_sums(sum, row_warps, room);
    if (thread() == 0) p.partials[block_x()] = sum[0];
}

FIVEDP_KERNEL(row_threads, 2)
add_squares(SquaredNormProblem p, std::int64_t n_partials) {
    double* const room = reinterpret_cast<double*>(dynamic_shared());
    double sum[1] = {0};
    for (std::int64_t i = thread(); i < n_partials; i += row_threads) sum[0] += p.partials[i];
    row_sums(sum, row_warps, room);
    if (thread() == 0) *p.total = p.add ? *p.total + sum[0] : sum[0];
}

template <class P, class G>
void start(const AdamwProblem& p, Stream stream) {
    const bool wide = lies_wide(p.parameter, 0) && lies_wide(p.gradient, 0) && lies_wide(p.master, 0) &&
                      lies_wide(p.first_moment, 0) && lies_wide(p.second_moment, 0);
    const std::int64_t per_block = row_threads * piece<Sum<P>>;
    launch(adamw_elements<P, G>, (p.n + per_block - 1) / per_block, 1, 1, row_threads, 0, stream, p, wide);
}

}  // namespace

void adamw(const AdamwProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using P = typename decltype(tag)::type;
        if (p.gradient_type == p.type)
            start<P, P>(p, stream);
        else
            start<P, Sum<P>>(p, stream);
    });
}

std::int64_t squared_norm_partials(std::int64_t n) {
    return std::min((n + elements_of_a_block - 1) / elements_of_a_block, most_blocks);
}

void squared_norm(const SquaredNormProblem& p, Stream stream) {
    constexpr std::int64_t room = row_warps * sizeof(double);
    const std::int64_t n_partials = squared_norm_partials(p.n);
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(square_elements<T>, n_partials, 1, 1, row_threads, room, stream, p, lies_wide(p.x, 0));
    });
    launch(add_squares, 1, 1, 1, row_threads, room, stream, p, n_partials);
}

}  // namespace fivedp
