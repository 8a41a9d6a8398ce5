// Tiles of attention in shared memory, in 16 bits, and the two kinds of products with them.
//
// A tile is (rows, width) with the width of a row a power of two from 64: rows of 128 bytes or more, in chunks of 16.
// Chunk c of row r lies at place c ^ (r % 8) of its row: the 8 rows of an 8 x 8 matrix, which ldmatrix reads at once,
// lie in different banks, and so do those of a transposed one.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fivedp {

constexpr int attention_warps = 4, attention_threads = 32 * attention_warps;

template <int width>
FIVEDP_DEVICE int tile_offset(int row, int chunk) {
    return (row * (width / 8) + (chunk ^ (row & 7))) * 16;
}

// The first row of a head.
template <class T>
FIVEDP_DEVICE const T* head_rows(const DeviceTokens& tokens, int batch, int head) {
    return static_cast<const T*>(tokens.data) + batch * tokens.batch + head * tokens.head;
}

// Rows [first, first + rows) of a head to a tile, with zeros after the last token and the last element. Asynchronous
// where rows are aligned; in any case there after wait_for_copies and a barrier.
template <class T, int width, int rows>
FIVEDP_DEVICE void load_tile(char* to, const DeviceTokens& tokens, const T* from, int first, int n_tokens, int size) {
    constexpr int chunks = width / 8, step = attention_threads / chunks;
    const int me = computed_here(thread()), chunk = me % chunks, first_row = me / chunks;
    const int left = size - chunk * 8;
    const int in_chunk = left < 0 ? 0 : left < 8 ? left : 8;
    const T* source = from + static_cast<std::int64_t>(first + first_row) * tokens.token + chunk * 8;
    if (tokens.aligned) {
        FIVEDP_UNROLL
        for (int row = first_row; row < rows; row += step, source += step * tokens.token) {
            const int n = first + row < n_tokens ? in_chunk : 0;
            copy_async_16(to + tile_offset<width>(row, chunk), n > 0 ? source : from, 2 * n);
        }
    } else {
        FIVEDP_NO_UNROLL
        for (int row = first_row; row < rows; row += step, source += step * tokens.token) {
            const int n = first + row < n_tokens ? in_chunk : 0;
            Vec16<T> values;
            FIVEDP_UNROLL
            for (int e = 0; e < 8; ++e) values.at[e] = e < n ? source[e] : T{0};
            *reinterpret_cast<Vec16<T>*>(to + tile_offset<width>(row, chunk)) = values;
        }
    }
}

// sums (16 m rows of `left` from `first_row`, 8 n rows of `right`) = left right^T, over the width of both tiles.
template <class T, int width, int m, int n>
FIVEDP_DEVICE void multiply_rows(float (&sums)[m][n][4], const char* left, int first_row, const char* right) {
    FIVEDP_UNROLL
    for (int i = 0; i < m; ++i) FIVEDP_UNROLL
    for (int j = 0; j < n; ++j) FIVEDP_UNROLL
    for (int e = 0; e < 4; ++e) sums[i][j][e] = 0;
    // From one chunk to the next is an exclusive or, from one row to the eighth after it a sum.
    const int left_at = computed_here(tile_offset<width>(first_row + (lane() & 15), lane() >> 4));
    const int right_at = computed_here(tile_offset<width>((lane() & 7) + 8 * (lane() >> 4), lane() >> 3 & 1));
    constexpr int row_bytes = width * 2;
    FIVEDP_UNROLL
    for (int k = 0; k < width / 16; ++k) {
        std::uint32_t a[m][4];
        FIVEDP_UNROLL
        for (int i = 0; i < m; ++i) warp_load_matrices(a[i], left + (left_at ^ (32 * k)) + 16 * i * row_bytes);
        FIVEDP_UNROLL
        for (int j = 0; j < n; j += 2) {
            std::uint32_t b[4];
            warp_load_matrices(b, right + (right_at ^ (32 * k)) + 8 * j * row_bytes);
            FIVEDP_UNROLL
            for (int i = 0; i < m; ++i) {
                warp_multiply<T>(sums[i][j], a[i], b[0], b[1]);
                warp_multiply<T>(sums[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Accumulators as the left factor of the next product, rounded to T.
template <class T, int m, int n>
FIVEDP_DEVICE void as_factors(const float (&sums)[m][n][4], std::uint32_t (&to)[m][n / 2][4]) {
    FIVEDP_UNROLL
    for (int i = 0; i < m; ++i) FIVEDP_UNROLL
    for (int k = 0; k < n / 2; ++k) FIVEDP_UNROLL
    for (int e = 0; e < 4; ++e) {
        const float(&pair)[4] = sums[i][2 * k + e / 2];
        to[i][k][e] = pack_pair<T>(pair[2 * (e % 2)], pair[2 * (e % 2) + 1]);
    }
}

// sums (16 m rows, 8 n columns of `right` from chunk `first_chunk`, a multiple of 8) += left right, over the 16 depth
// rows of `right`.
template <class T, int width, int m, int depth, int n>
FIVEDP_DEVICE void multiply_columns(float (&sums)[m][n][4], const std::uint32_t (&left)[m][depth][4], const char* right,
                                    int first_chunk) {
    const int at = computed_here(tile_offset<width>(lane() & 15, lane() >> 4) + 16 * first_chunk);
    FIVEDP_UNROLL
    for (int k = 0; k < depth; ++k) FIVEDP_UNROLL
    for (int j = 0; j < n; j += 2) {
        std::uint32_t b[4];
        warp_load_transposed(b, right + (at ^ (16 * j)) + 16 * k * width * 2);
        FIVEDP_UNROLL
        for (int i = 0; i < m; ++i) {
            warp_multiply<T>(sums[i][j], left[i][k], b[0], b[1]);
            warp_multiply<T>(sums[i][j + 1], left[i][k], b[2], b[3]);
        }
    }
}

// NaN and infinity in the `tokens` rows of a tile of which only some pairs are visible: 0 times one of them would be
// NaN where it is not even seen. All threads of a block ask together whether there are any; `room` holds a number for
// each warp, and is free again after the next barrier. If there are, `add_nonfinite` adds what they make of the pairs
// that do see them, and `clear_nonfinite` puts 0 in their place before the product.

FIVEDP_DEVICE bool nonfinite(Bf16 x) {
    return (x.bits & 0x7f80) == 0x7f80;
}
FIVEDP_DEVICE bool nonfinite(Half x) {
    return (x.bits & 0x7c00) == 0x7c00;
}

// Puts 0 where 16 bytes of a tile are not finite; whether any were.
template <class T>
FIVEDP_DEVICE bool clear_chunk(char* chunk) {
    Vec16<T>* const place = reinterpret_cast<Vec16<T>*>(chunk);
    Vec16<T> values = *place;
    bool found = false;
    FIVEDP_UNROLL
    for (int e = 0; e < 8; ++e) {
        if (!nonfinite(values.at[e])) continue;
        values.at[e] = T{0};
        found = true;
    }
    if (found) *place = values;
    return found;
}

template <class T, int width, int tokens>
FIVEDP_DEVICE bool any_nonfinite(const char* tile, int* room) {
    bool found = false;
    FIVEDP_NO_UNROLL
    for (int i = thread(); i < tokens * width / 8; i += attention_threads) {
        const Vec16<T> values = *reinterpret_cast<const Vec16<T>*>(tile + 16 * i);
        FIVEDP_UNROLL
        for (int e = 0; e < 8; ++e) found = found || nonfinite(values.at[e]);
    }
    const bool in_warp = warp_ballot(found) != 0;
    if (lane() == 0) room[thread() / 32] = in_warp;
    sync_block();
    bool any = false;
    FIVEDP_UNROLL
    for (int w = 0; w < attention_warps; ++w) any = any || room[w] != 0;
    return any;
}

template <class T, int width, int tokens>
FIVEDP_DEVICE void clear_nonfinite(char* tile) {
    sync_block();
    FIVEDP_NO_UNROLL
    for (int i = thread(); i < tokens * width / 8; i += attention_threads) clear_chunk<T>(tile + 16 * i);
    sync_block();
}

// For the product over the tile's tokens, from `first_token`, of which the sums have rows from `first_row`. A weight is
// positive, so infinity stays what it is; of a derivative (`as_nan`) it makes NaN.
template <class T, int width, int tokens, bool keys_in_tile, int m, int n>
FIVEDP_DEVICE void add_nonfinite(const DeviceAttention& a, const char* tile, int first_token, int first_row,
                                 int first_chunk, bool as_nan, float (&sums)[m][n][4]) {
    const int n_tokens = keys_in_tile ? a.n_keys : a.n_queries, rows = keys_in_tile ? a.n_queries : a.n_keys;
    FIVEDP_NO_UNROLL
    for (int t = 0; t < tokens; ++t) {
        if (first_token + t >= n_tokens) break;
        const Place place = keys_in_tile ? key_place(a, first_token + t) : query_place(a, first_token + t);
        std::uint32_t seen = 0;
        FIVEDP_UNROLL
        for (int r = 0; r < 2 * m; ++r) {
            const int row = first_row + accumulator_row(r);
            if (row < rows && (keys_in_tile ? sees(a, query_place(a, row), place) : sees(a, place, key_place(a, row))))
                seen |= 1u << r;
        }
        FIVEDP_UNROLL
        for (int j = 0; j < n; ++j) FIVEDP_UNROLL
        for (int e = 0; e < 2; ++e) {
            const char* const at = tile + tile_offset<width>(t, first_chunk + j) + 2 * (2 * (lane() % 4) + e);
            const T value = *reinterpret_cast<const T*>(at);
            if (!nonfinite(value)) continue;
            const float add = as_nan ? bits_as_float(0x7fc00000u) : to_float(value);
            FIVEDP_UNROLL
            for (int i = 0; i < m; ++i) {
                if (seen >> (2 * i) & 1) sums[i][j][e] += add;
                if (seen >> (2 * i + 1) & 1) sums[i][j][2 + e] += add;
            }
        }
    }
}

}  // namespace fivedp
