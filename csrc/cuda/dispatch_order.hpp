// What the kernels of cuda/dispatch_order.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// Pairs that a block places; a block has pairs of one source.
constexpr std::int64_t tile_pairs = 2048;
constexpr int most_local_experts = 2048;

// The order of an owner's rows (layout/dispatch.py, Incoming). All arrays are on the device.
struct DispatchOrder {
    std::int64_t pairs;
    // (pairs): the expert, which has no place unless it is first_expert <= e < first_expert + experts; the token on its
    // source, rising within a source, or null where pair p is of token p / slots.
    const std::int32_t *expert, *token;
    int slots, first_expert, experts, sources;
    const std::int64_t* starts;      // (sources + 1): borders of the sources among the pairs
    const std::int64_t* first_tile;  // (sources + 1): the same in tiles of tile_pairs, each source in whole ones
    std::int64_t tiles;              // first_tile[sources]
    const void* weights;             // (pairs), or null
    int weight_bytes;                // 4 or 8

    // By place: (pairs), filled up with -1 (weights with 0) behind the last row.
    std::int32_t *source, *row_token, *row;
    void* row_weights;
    std::int32_t* positions;         // (pairs): the place of every pair, -1 where it has none
    std::int64_t *counts, *offsets;  // (experts), (experts + 1)
    std::int64_t* n_rows;            // (sources): rows that the source sends
    std::int32_t* workspace;         // (experts + 1) * (tiles + 1)
};
void dispatch_order(const DispatchOrder& problem, Stream stream);

// kept = chosen, with -1 where an expert has had `capacity` tokens before: before[slot][expert] elsewhere, and those of
// the same slot of earlier tokens here.
struct DropProblem {
    std::int64_t tokens;
    int slots, experts;
    const std::int32_t* chosen;  // (tokens, slots)
    const std::int64_t* before;  // (slots, experts)
    std::int64_t capacity;
    std::int32_t* kept;       // (tokens, slots)
    std::int32_t* workspace;  // slots * experts * (tiles + 1), tiles = ceil(tokens / tile_pairs)
};
void drop_by_position(const DropProblem& problem, Stream stream);

}  // namespace fivedp
