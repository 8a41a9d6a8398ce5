// Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and its inverse, which is its backward.
//
// A block has a few tokens with all their heads. It first brings the cosines and sines of its tokens' positions into
// shared memory, once for all heads: from tables, or computed in double, because an angle of 10^5 has no digits left
// behind the point in float. Then each thread rotates 16 bytes at a time: neighbouring pairs where they are
// interleaved, else 16 bytes of either half. Bytes: x read once and y written once; 3 FLOPs an element. Elements behind
// the rotated ones are copied where y is not x.
#include "cuda/pointwise_rotary.hpp"

#include <algorithm>

#include "cuda/rows.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

template <class S>
FIVEDP_DEVICE void fill_angles(const RotaryProblem& p, std::int64_t first_token, int tokens, S* cosines, S* sines) {
    const int half = static_cast<int>(p.rotated / 2);
    const double octaves = -2.0 / static_cast<double>(p.rotated) * log2(p.base);
    for (int at = thread(); at < tokens * half; at += row_threads) {
        const std::int64_t token = first_token + at / half, pair = at % half;
        const std::int64_t place = token % p.sequence;
        const std::int64_t position =
            p.positions != nullptr ? p.positions[token / p.sequence * p.positions_stride + place] : place;
        S cosine, sine;
        if (p.cosines == nullptr) {
            double exact_sine, exact_cosine;
            sine_cosine(static_cast<double>(position) * exp2(static_cast<double>(pair) * octaves), &exact_sine,
                        &exact_cosine);
            sine = static_cast<S>(exact_sine);
            cosine = static_cast<S>(exact_cosine);
        } else if (position >= 0 && position < p.table_rows) {
            cosine = static_cast<const S*>(p.cosines)[position * half + pair];
            sine = static_cast<const S*>(p.sines)[position * half + pair];
        } else {
            cosine = sine = bits_as_float(0x7fc00000u);  // beyond the tables: seen, and no memory is read
        }
        cosines[at] = cosine;
        sines[at] = p.inverse ? -sine : sine;
    }
}

template <class T>
FIVEDP_KERNEL(row_threads, 2)
rotate_tokens(RotaryProblem p, int tokens_of_a_block, int rotating, int copying, bool wide) {
    using S = Sum<T>;
    constexpr int n = piece<T>;
    const std::int64_t first_token = block_x() * tokens_of_a_block, left = p.batch * p.sequence - first_token;
    const int tokens = left < tokens_of_a_block ? static_cast<int>(left) : tokens_of_a_block;
    const int half = static_cast<int>(p.rotated / 2), heads = static_cast<int>(p.heads);
    S* const cosines = reinterpret_cast<S*>(dynamic_shared());
    S* const sines = cosines + tokens_of_a_block * half;
    fill_angles(p, first_token, tokens, cosines, sines);
    sync_block();

    // Work is numbered by token, head and unit of 16 bytes: `rotating` units of a head, then `copying` others.
    const int units = rotating + copying;
    for (int at = thread(); at < tokens * heads * units; at += row_threads) {
        const int unit = at % units, head = at / units % heads, token_here = at / units / heads;
        const std::int64_t token = first_token + token_here, sequence = token / p.sequence, place = token % p.sequence;
        const T* const x =
            static_cast<const T*>(p.x) + sequence * p.x_strides[0] + place * p.x_strides[1] + head * p.x_strides[2];
        T* const y = static_cast<T*>(p.y) + sequence * p.y_strides[0] + place * p.y_strides[1] + head * p.y_strides[2];
        const S* const cosine = cosines + token_here * half;
        const S* const sine = sines + token_here * half;
        if (unit >= rotating) {
            const std::int64_t first = p.rotated + n * (unit - rotating);
            store_elements<n>(y, first, p.size, wide, load_elements<n>(x, first, p.size, wide));
        } else if (p.interleaved) {
            const std::int64_t first = n * unit;
            const Elements<T, n> pairs = load_elements<n>(x, first, p.rotated, wide);
            Elements<T, n> turned;
            FIVEDP_UNROLL
            for (int e = 0; e < n; e += 2) {
                const std::int64_t pair = (first + e) / 2;
                const S c = pair < half ? cosine[pair] : S(0), s = pair < half ? sine[pair] : S(0);
                const S a = to_float(pairs.at[e]), b = to_float(pairs.at[e + 1]);
                turned.at[e] = from_float<T>(S(a * c - b * s));
                turned.at[e + 1] = from_float<T>(S(a * s + b * c));
            }
            store_elements<n>(y, first, p.rotated, wide, turned);
        } else {
            const std::int64_t first = n * unit;
            Elements<T, n> low = load_elements<n>(x, first, half, wide);
            Elements<T, n> high = load_elements<n>(x + half, first, half, wide);
            FIVEDP_UNROLL
            for (int e = 0; e < n; ++e) {
                const std::int64_t pair = first + e;
                const S c = pair < half ? cosine[pair] : S(0), s = pair < half ? sine[pair] : S(0);
                const S a = to_float(low.at[e]), b = to_float(high.at[e]);
                low.at[e] = from_float<T>(S(a * c - b * s));
                high.at[e] = from_float<T>(S(a * s + b * c));
            }
            store_elements<n>(y, first, half, wide, low);
            store_elements<n>(y + half, first, half, wide, high);
        }
    }
}

}  // namespace

void rotary(const RotaryProblem& p, Stream stream) {
    with_type(p.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr std::int64_t n = piece<T>, size = sizeof(T);
        const std::int64_t half = p.rotated / 2, rotating = ((p.interleaved ? p.rotated : half) + n - 1) / n;
        const std::int64_t copying = p.x == p.y ? 0 : (p.size - p.rotated + n - 1) / n;
        bool wide = p.rotated % n == 0 && (p.interleaved || half % n == 0);
        for (int d = 0; d < 3; ++d)
            wide = wide && lies_wide(p.x, p.x_strides[d] * size) && lies_wide(p.y, p.y_strides[d] * size);
        const std::int64_t units = p.heads * (rotating + copying);
        if (units == 0) return;
        // Two units a thread, where shared memory has room for the angles; always one token.
        const std::int64_t angles = 2 * half * static_cast<std::int64_t>(sizeof(Sum<T>));
        std::int64_t tokens = (2 * row_threads + units - 1) / units;
        if (angles > 0) tokens = std::max<std::int64_t>(1, std::min(tokens, 32 * 1024 / angles));
        launch(rotate_tokens<T>, (p.batch * p.sequence + tokens - 1) / tokens, 1, 1, row_threads, tokens * angles,
               stream, p, static_cast<int>(tokens), static_cast<int>(rotating), static_cast<int>(copying), wide);
    });
}

}  // namespace fivedp
