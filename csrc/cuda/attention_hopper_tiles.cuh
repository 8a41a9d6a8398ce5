// The tiles of attention_forward_sm90.cu: where they lie in shared memory, in which order they come, the warp that
// brings them, and the warps that look for NaN and infinity in values. What the backward has in common with it, too.
#pragma once

#include "cuda/attention_tiles.cuh"
#include "cuda/hopper.cuh"

namespace fivedp {

constexpr int consumer_warps = 8, checking_warps = 3, hopper_threads = 32 * (consumer_warps + 1 + checking_warps);
constexpr int group_rows = 64, block_rows = 2 * group_rows;
// 8 x 232 + 4 x 40 registers of 32 lanes are what 12 warps with 168 each have.
constexpr int consumer_registers = 232, copying_registers = 40;

template <int width>
struct Tiles {
    static constexpr int keys = width > 128 ? 64 : 128, halves = keys / attention_tile, stages = width > 64 ? 2 : 4;
    static constexpr int panels = width / panel_columns, panel = keys * 128, bytes = panels * panel;  // of a stage
    static constexpr int q_panel = group_rows * 128, q_bytes = panels * q_panel;                      // of a warpgroup
};

template <int width>
struct Shared {
    using Tile = Tiles<width>;
    char queries[2][Tile::q_bytes];
    char keys[Tile::stages][Tile::bytes];
    char values[Tile::stages][Tile::bytes];
    Barrier queries_landed;
    Barrier keys_landed[Tile::stages], keys_free[Tile::stages];
    Barrier values_landed[Tile::stages], values_checked[Tile::stages], values_free[Tile::stages];
    int spoilt[Tile::stages][checking_warps];  // whether a warp found values that are not finite
};

template <int width>
FIVEDP_DEVICE Shared<width>& shared_of_block() {
    return shared_from_boundary<Shared<width>>();
}

// The tiles of `halves` times 64 keys that a block goes through. Every warp makes the same list by itself.
template <int halves>
struct KeyWalk {
    TileWalk<true> walk;

    FIVEDP_DEVICE KeyWalk(const DeviceAttention& a, const Work& work)
        : walk(a, work.tile * 2, tiles_of(a.n_queries) - work.tile * 2 < 2 ? 1 : 2) {}

    // The first key of the next tile, -1 after the last. Bit h of `whole`: all pairs with half h are visible.
    FIVEDP_DEVICE int next(std::uint32_t& whole) {
        bool all = false;
        const int tile = walk.next(all);
        if (tile < 0) return -1;
        if (halves == 1) {
            whole = all;
            return tile * attention_tile;
        }
        // Tiles of 64 come from the last to the first: what is left of a pair is its lower one. Both are in one word.
        const int pair = tile & 30;
        whole = walk.whole >> pair & 3;
        walk.seen &= ~(3u << pair);
        return (tile & ~1) * attention_tile;
    }
};

// What all warps of a block know.
struct Block {
    Work work;
    int first_query, kv_head;
};

// Brings queries, keys and values. The values of a tile come after the keys of the next one, which are needed first.
template <class T, int width>
FIVEDP_DEVICE void bring_tiles(const Block& block, KeyWalk<Tiles<width>::halves>& walk, int first_key,
                               const TensorMap& q, const TensorMap& k, const TensorMap& v) {
    using Tile = Tiles<width>;
    Shared<width>& shared = shared_of_block<width>();
    if (lane() == 0) {
        arrive_expecting(&shared.queries_landed, 2 * Tile::q_bytes);
        FIVEDP_UNROLL
        for (int i = 0; i < 2 * Tile::panels; ++i)
            copy_box(shared.queries[i / Tile::panels] + i % Tile::panels * Tile::q_panel, &q, &shared.queries_landed,
                     i % Tile::panels * panel_columns, block.first_query + i / Tile::panels * group_rows,
                     block.work.head, block.work.batch);
    }
    const auto bring = [&](const TensorMap& map, char* to, Barrier* landed, int first) {
        if (lane() != 0) return;
        arrive_expecting(landed, Tile::bytes);
        FIVEDP_UNROLL
        for (int i = 0; i < Tile::panels; ++i)
            copy_box(to + i * Tile::panel, &map, landed, i * panel_columns, first, block.kv_head, block.work.batch);
    };
    Turn<Tile::stages> key_turn, value_turn;
    int key_before = -1;
    std::uint32_t whole;
    while (first_key >= 0 || key_before >= 0) {
        if (first_key >= 0) {
            wait_for_phase(&shared.keys_free[key_turn.stage], key_turn.parity ^ 1);
            bring(k, shared.keys[key_turn.stage], &shared.keys_landed[key_turn.stage], first_key);
            key_turn.next();
        }
        if (key_before >= 0) {
            wait_for_phase(&shared.values_free[value_turn.stage], value_turn.parity ^ 1);
            bring(v, shared.values[value_turn.stage], &shared.values_landed[value_turn.stage], key_before);
            value_turn.next();
        }
        key_before = first_key;
        if (first_key >= 0) first_key = walk.next(whole);
    }
}

// Looks at values of which some pairs are not visible: a weight of 0 would make NaN of NaN and infinity, so 0 takes
// their place. All three warps come to every tile, so none is a phase behind.
template <class T, int width>
FIVEDP_DEVICE void check_values(KeyWalk<Tiles<width>::halves>& walk, int first_key, std::uint32_t whole) {
    using Tile = Tiles<width>;
    Shared<width>& shared = shared_of_block<width>();
    const int me = warp() - consumer_warps - 1;
    Turn<Tile::stages> turn;
    for (; first_key >= 0; first_key = walk.next(whole), turn.next()) {
        wait_for_phase(&shared.values_landed[turn.stage], turn.parity);
        if (whole != (1u << Tile::halves) - 1) {
            bool found = false;
            FIVEDP_NO_UNROLL
            for (int i = 32 * me + lane(); i < Tile::bytes / 16; i += 32 * checking_warps)
                found = clear_chunk<T>(shared.values[turn.stage] + 16 * i) || found;
            found = warp_ballot(found) != 0;
            if (lane() == 0) shared.spoilt[turn.stage][me] = found;
        }
        publish_to_products();
        warp_sync();
        if (lane() == 0) arrive(&shared.values_checked[turn.stage]);
    }
}

// What NaN and infinity among `count` tokens' rows make of the sums whose rows see them, from the rows themselves: in
// shared memory they are 0. A weight is positive, so infinity stays what it is; of a derivative (`as_nan`) it makes
// NaN.
template <class T, bool keys_in_tile, bool as_nan, int n>
FIVEDP_DEVICE void add_spoilt(const DeviceAttention& a, const T* rows, std::int64_t step, int size, int first_token,
                              int count, int first_row, float (&sums)[n][4]) {
    const int n_tokens = keys_in_tile ? a.n_keys : a.n_queries, n_rows = keys_in_tile ? a.n_queries : a.n_keys;
    FIVEDP_NO_UNROLL
    for (int token = first_token; token < first_token + count && token < n_tokens; ++token) {
        const Place place = keys_in_tile ? key_place(a, token) : query_place(a, token);
        bool seen[2];
        FIVEDP_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + accumulator_row(r);
            seen[r] = row < n_rows &&
                      (keys_in_tile ? sees(a, query_place(a, row), place) : sees(a, place, key_place(a, row)));
        }
        const int first_column = computed_here(accumulator_column(0)), left = size - first_column;
        const T* const from = rows + token * step + first_column;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            const int column = 8 * (c / 2) + c % 2;
            if (column >= left || !nonfinite(from[column])) continue;
            const float add = as_nan ? bits_as_float(0x7fc00000u) : to_float(from[column]);
            FIVEDP_UNROLL
            for (int r = 0; r < 2; ++r)
                if (seen[r]) sums[c / 2][2 * r + c % 2] += add;
        }
    }
}

// Whether the copy engine can be told of an array: rows at multiples of 16 bytes, no rows in each other's place. The
// step of a dimension of one is free.
inline bool boxed(const DeviceAttention& a, const DeviceTokens& tokens, int n_tokens, int heads, int size, int rows,
                  BoxedTensor& to) {
    to = {a.type, tokens.data, size, {n_tokens, heads, a.batch}, {}, rows};
    const std::int64_t steps[] = {tokens.token, tokens.head, tokens.batch};
    bool fits = tokens.aligned;
    for (int i = 0; i < 3; ++i) {
        to.steps[i] = to.counts[i] > 1 ? 2 * steps[i] : 16 * ((2 * std::int64_t{size} + 15) / 16);
        fits = fits && to.steps[i] > 0 && to.steps[i] % 16 == 0 && to.steps[i] < std::int64_t{1} << 40;
    }
    return fits;
}

}  // namespace fivedp
