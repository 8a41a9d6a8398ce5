// Which query sees which key, for a pair, for two tiles, and for the elements of a warp's accumulators.
//
// A mask is a function of the (document, position) of two tokens. Tiles of 64 tokens have spans of these; two spans
// tell whether the mask leaves nothing of the pairs of two tiles, all, or some. Only in the last case pairs are looked
// at.
#pragma once

#include "cuda/attention.hpp"
#include "cuda/matrix.cuh"

namespace fivedp {

enum class Sight { none, some, all };

// Query i sees key j where both are of one document and
//     causal: j <= i,   window w: i - j < w and, unless causal, j - i < w.
// Positions are not negative, so differences don't overflow.
FIVEDP_DEVICE Sight sight(bool causal, int window, const TileSpan& q, const TileSpan& k) {
    const int least = q.position_low - k.position_high, greatest = q.position_high - k.position_low;  // of i - j
    if (q.document_low > k.document_high || q.document_high < k.document_low) return Sight::none;
    if (causal && greatest < 0) return Sight::none;
    if (window > 0 && (least >= window || (!causal && greatest <= -window))) return Sight::none;
    const bool one_document = q.document_low == q.document_high && k.document_low == k.document_high;
    const bool all =
        one_document && (!causal || least >= 0) && (window == 0 || (greatest < window && (causal || least > -window)));
    return all ? Sight::all : Sight::some;
}

struct Place {
    int position, document;
};
FIVEDP_DEVICE Place place_at(const std::int32_t* position, const std::int32_t* document, int index) {
    return {position[index], document != nullptr ? document[index] : 0};
}
FIVEDP_DEVICE Place query_place(const DeviceAttention& a, int query) {
    return place_at(a.q_position, a.q_document, query);
}
FIVEDP_DEVICE Place key_place(const DeviceAttention& a, int key) {
    return place_at(a.k_position, a.k_document, key);
}

FIVEDP_DEVICE bool sees(const DeviceAttention& a, Place query, Place key) {
    const int apart = query.position - key.position;
    if (query.document != key.document || (a.causal && apart < 0)) return false;
    return a.window == 0 || (apart < a.window && (a.causal || -apart < a.window));
}

FIVEDP_HOST_DEVICE int tiles_of(int n_tokens) {
    return (n_tokens + attention_tile - 1) / attention_tile;
}

// Tiles of one side that some of up to two tiles of the other see, from the last to the first: under a causal mask
// those that need masking come first. A warp asks about 32 tiles at a time, a lane for each.
template <bool over_keys>
struct TileWalk {
    const DeviceAttention& a;
    int first, count;  // tiles of the other side
    int chunk;
    std::uint32_t seen = 0, whole = 0;  // of tiles 32 * chunk + bit

    FIVEDP_DEVICE TileWalk(const DeviceAttention& problem, int first_tile, int n_tiles)
        : a(problem), first(first_tile), count(n_tiles) {
        restart();
    }
    FIVEDP_DEVICE void restart() {
        chunk = (tiles_of(over_keys ? a.n_keys : a.n_queries) + 31) / 32;
        seen = 0;
    }
    // The next tile, -1 after the last. `all`: every pair is visible, and there are 64 tokens.
    FIVEDP_DEVICE int next(bool& all) {
        const int n_tokens = over_keys ? a.n_keys : a.n_queries;
        while (seen == 0) {
            if (chunk == 0) return -1;
            --chunk;
            const int tile = 32 * chunk + lane();
            bool any = false, every = false;
            if (tile < tiles_of(n_tokens)) {
                const TileSpan mine = (over_keys ? a.k_spans : a.q_spans)[tile];
                every = (tile + 1) * attention_tile <= n_tokens;
                for (int i = 0; i < count; ++i) {
                    const TileSpan other = (over_keys ? a.q_spans : a.k_spans)[first + i];
                    const Sight one =
                        over_keys ? sight(a.causal, a.window, other, mine) : sight(a.causal, a.window, mine, other);
                    any = any || one != Sight::none;
                    every = every && one == Sight::all;
                }
            }
            seen = warp_ballot(any);
            whole = warp_ballot(every);
        }
        const int bit = highest_bit(seen);
        seen ^= 1u << bit;
        all = (whole >> bit & 1) != 0;
        return 32 * chunk + bit;
    }
};

// Which tile of which head a block works on. Heads are taken in sections whose keys and values (or queries) together
// stay in the L2 cache; within one, tiles from the one that has most to do.
struct Work {
    int batch, head, tile;
};
FIVEDP_DEVICE Work work_of(int n_heads, int per_batch, int section, int n_tiles, bool last_tile_first) {
    const int which = static_cast<int>(block_x() / (static_cast<std::int64_t>(section) * n_tiles));
    const int before = which * section, heads = n_heads - before < section ? n_heads - before : section;
    const int rest = static_cast<int>(block_x() - static_cast<std::int64_t>(before) * n_tiles);
    const int head = before + rest % heads, tile = rest / heads;
    return {head / per_batch, head % per_batch, last_tile_first ? n_tiles - 1 - tile : tile};
}
inline int heads_of_section(std::int64_t bytes_of_head) {
    constexpr std::int64_t cache = 20 << 20;  // half of the L2 of A100, the smallest of the large chips
    return bytes_of_head > 0 && bytes_of_head < cache ? static_cast<int>(cache / bytes_of_head) : 1;
}

// Of the accumulators of a warp, 16 rows and 8 columns each, row r of this thread and column c.
FIVEDP_DEVICE int accumulator_row(int r) {
    return 16 * (r / 2) + 8 * (r % 2) + lane() / 4;
}
FIVEDP_DEVICE int accumulator_column(int c) {
    return 8 * (c / 2) + 2 * (lane() % 4) + c % 2;
}

// Which pairs of this thread's rows, counted from `first_row`, and of its columns, from `first_column`, are visible:
// bit 16 * (r % 2) + c of bits[r / 2]. Pairs of a token that is not there are not.
template <bool keys_in_columns, int n_columns, int m>
FIVEDP_DEVICE void visible_bits(const DeviceAttention& a, int first_row, int first_column, std::uint32_t (&bits)[m]) {
    const int rows = keys_in_columns ? a.n_queries : a.n_keys, columns = keys_in_columns ? a.n_keys : a.n_queries;
    Place of_row[2 * m];
    FIVEDP_UNROLL
    for (int r = 0; r < 2 * m; ++r) {
        const int row = first_row + accumulator_row(r);
        of_row[r] = row < rows ? (keys_in_columns ? query_place(a, row) : key_place(a, row)) : Place{0, 0};
        bits[r / 2] = 0;
    }
    FIVEDP_NO_UNROLL
    for (int c = 0; c < n_columns; ++c) {
        const int column = first_column + accumulator_column(c);
        if (column >= columns) continue;
        const Place place = keys_in_columns ? key_place(a, column) : query_place(a, column);
        FIVEDP_UNROLL
        for (int r = 0; r < 2 * m; ++r) {
            const bool seen = first_row + accumulator_row(r) < rows &&
                              (keys_in_columns ? sees(a, of_row[r], place) : sees(a, place, of_row[r]));
            bits[r / 2] |= static_cast<std::uint32_t>(seen) << (16 * (r % 2) + c);
        }
    }
}
template <int m>
FIVEDP_DEVICE bool visible(const std::uint32_t (&bits)[m], int r, int c) {
    return (bits[r / 2] >> (16 * (r % 2) + c) & 1) != 0;
}

constexpr double natural_log_of_2 = 0.69314718055994530942, log2_of_e = 1.4426950408889634074;

FIVEDP_DEVICE float power_of_2(float x) {
    return exp2f(x);
}
FIVEDP_DEVICE double power_of_2(double x) {
    return exp2(x);
}
FIVEDP_DEVICE float natural_log(float x) {
    return logf(x);
}
FIVEDP_DEVICE double natural_log(double x) {
    return log(x);
}
FIVEDP_DEVICE float hyperbolic_tangent(float x) {
    return tanhf(x);
}
FIVEDP_DEVICE double hyperbolic_tangent(double x) {
    return tanh(x);
}

// ALiBi's slope of a head in units of log(2), 0 for none.
template <class S>
FIVEDP_DEVICE S slope_of(const DeviceAttention& a, int head) {
    return a.slopes != nullptr ? static_cast<S>(a.slopes[head] * log2_of_e) : S(0);
}

// How logits become exponents of 2: the sum of products, times `factor`. Where they are bent (softcap, ALiBi), or the
// factor would not be positive, they are brought to units of log(2) one by one first, and the factor is 1.
template <class S>
struct Bend {
    bool bent;
    S scale, cap, factor;  // the first two in units of log(2); a cap of 0 is none
    S steepness;           // of the softcap: 2 log2(e) / cap
};
template <class S>
Bend<S> bend_of(const DeviceAttention& a) {
    const bool bent = a.softcap > 0 || a.slopes != nullptr || !(a.scale > 0);
    const S scale = static_cast<S>(a.scale * log2_of_e);
    return {bent, scale, static_cast<S>(a.softcap * log2_of_e), bent ? S(1) : scale,
            static_cast<S>(a.softcap > 0 ? 2 / a.softcap : 0.0)};
}

// A logit in units of log(2) from its sum of products; `fall` is the slope of ALiBi in these units, `apart` i - j.
// `derivative` is that of the softcap.
template <class S>
FIVEDP_DEVICE S bend_logit(const Bend<S>& bend, S product, S fall, int apart, S& derivative) {
    S x = product * bend.scale;
    derivative = 1;
    if (bend.cap > 0) {
        const S bent = hyperbolic_tangent(x / bend.cap);
        x = bend.cap * bent;
        derivative = S(1) - bent * bent;
    }
    return x - fall * static_cast<S>(apart < 0 ? -apart : apart);
}

// The same in few registers: tanh from one exponential, absolutely, not relatively, as precise as float is.
FIVEDP_DEVICE float bend_logit_fast(const Bend<float>& bend, float product, float fall, int apart, float& derivative) {
    float x = product * bend.scale;
    derivative = 1.0f;
    if (bend.cap > 0) {
        const float power = fast_exp2(-fabsf(x) * bend.steepness), inverse = fast_reciprocal(1.0f + power);
        x = copysignf(bend.cap * (1.0f - power) * inverse, x);
        derivative = 4.0f * power * inverse * inverse;
    }
    return x - fall * static_cast<float>(apart < 0 ? -apart : apart);
}

}  // namespace fivedp
