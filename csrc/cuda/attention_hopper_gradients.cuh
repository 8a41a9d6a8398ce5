// What the kernels of attention_backward_sm90.cu and attention_backward_wide_sm90.cu have in common: the tiles in
// shared memory, the warp that brings them, products with them, and where sums go.
//
// A block has tokens of its own and goes through tiles of 64 tokens of the other side. Either side is two tensors, keys
// and values or queries and d_out: logits are the product of the first ones, d_weights = d_out v^T of the second ones.
// A tile comes to two slots of a ring, first what d_weights are made of, so a ring may have an odd number of slots.
#pragma once

#include <type_traits>

#include "cuda/attention_gradients.cuh"
#include "cuda/attention_hopper_tiles.cuh"

namespace fivedp {

constexpr int consumers = 32 * consumer_warps;

// `n_own` times 64 own tokens and the ring, each in panels of (64, 64), swizzled by 128 bytes (hopper.cuh). Of the
// first tensors there are `width` columns, of the second ones `v_width`.
template <int width, int v_width, int n_own, int n_slots>
struct GradientTiles {
    static constexpr int own_tiles = n_own, slots = n_slots;
    static constexpr int panel = attention_tile * 128;
    static constexpr int bytes = (width > v_width ? width : v_width) / panel_columns * panel;
    FIVEDP_HOST_DEVICE static constexpr int panels(int which) { return (which == 0 ? width : v_width) / panel_columns; }
    char own[2][n_own][bytes];
    char others[n_slots][bytes];
};
template <int n_slots>
struct GradientRing {
    float numbers[n_slots][attention_tile];  // where queries come: log_sum beside q, delta beside d_out
    Barrier own_landed, landed[n_slots], used[n_slots];
    int spoilt[consumer_warps];  // bit 0: a warp found what is not finite in the first tensor, bit 1: in the second
};

template <int n>
using Number = std::integral_constant<int, n>;

// The copy engine's descriptions of the first and the second tensor of either side.
struct GradientMaps {
    TensorMap own[2], others[2];
};

// f(width, v_width), constants: sizes of which one is above 128, padded to multiples of 64, from 128 on.
template <class F>
bool with_wide_shape(const DeviceAttention& a, const F& f) {
    const auto with_v = [&](auto width) {
        if (a.v_size > 192) return f(width, Number<256>{});
        if (a.v_size > 128) return f(width, Number<192>{});
        if constexpr (width > 128) return f(width, Number<128>{});
        return false;
    };
    return a.size > 192 ? with_v(Number<256>{}) : a.size > 128 ? with_v(Number<192>{}) : with_v(Number<128>{});
}

// The d_k and d_v of attention_backward_wide_sm90.cu. False: there is no code for this chip.
bool wide_key_gradients_sm90(const DeviceAttention& problem, const GradientMaps& maps, Stream stream);

template <class Room, bool of_keys>
FIVEDP_DEVICE Work own_work(const DeviceAttention& a, int section) {
    const int heads = of_keys ? a.kv_heads : a.heads, tiles = tiles_of(of_keys ? a.n_keys : a.n_queries);
    return work_of(a.batch * heads, heads, section, (tiles + Room::own_tiles - 1) / Room::own_tiles, !of_keys);
}

// The tiles of the other side, for keys of all heads that share them. Every warp makes the same list by itself.
template <class Room, bool of_keys>
struct OtherTiles {
    TileWalk<!of_keys> walk;
    int head, heads_end;  // of queries

    FIVEDP_DEVICE OtherTiles(const DeviceAttention& a, const Work& work)
        : walk(a, work.tile * Room::own_tiles, own_tiles(a, work)) {
        const int group = of_keys ? a.heads / a.kv_heads : 1;
        head = work.head * group;
        heads_end = head + group;
    }
    // The last block may have fewer.
    FIVEDP_DEVICE static int own_tiles(const DeviceAttention& a, const Work& work) {
        const int left = tiles_of(of_keys ? a.n_keys : a.n_queries) - work.tile * Room::own_tiles;
        return left < Room::own_tiles ? left : Room::own_tiles;
    }
    // The first token of the next tile, -1 after the last. `all`: every pair is visible.
    FIVEDP_DEVICE int next(bool& all) {
        for (;;) {
            const int tile = walk.next(all);
            if (tile >= 0) return tile * attention_tile;
            if (head + 1 >= heads_end) return -1;
            ++head;
            walk.restart();
        }
    }
};

// By one thread, before a barrier of the block.
template <class Room, bool of_keys>
FIVEDP_DEVICE void init_gradient_barriers() {
    Room& shared = shared_from_boundary<Room>();
    init_barrier(&shared.own_landed, 1);
    for (int slot = 0; slot < Room::slots; ++slot) {
        init_barrier(&shared.landed[slot], of_keys ? 33 : 1);  // the copies, and a warp's numbers
        init_barrier(&shared.used[slot], consumer_warps);
    }
    publish_barriers();
}

// What one warp does: the own tokens, then the tiles.
template <class Room, bool of_keys>
FIVEDP_DEVICE void bring_gradient_tiles(const DeviceAttention& a, const Work& work, OtherTiles<Room, of_keys>& others,
                                        int first_token, const GradientMaps& maps) {
    Room& shared = shared_from_boundary<Room>();
    const auto bring = [&](char* to, const TensorMap& map, Barrier* landed, int which, int token, int head) {
        FIVEDP_UNROLL
        for (int i = 0; i < Room::panels(which); ++i)
            copy_box(to + i * Room::panel, &map, landed, i * panel_columns, token, head, work.batch);
    };
    if (lane() == 0) {
        arrive_expecting(&shared.own_landed, Room::own_tiles * (Room::panels(0) + Room::panels(1)) * Room::panel);
        FIVEDP_UNROLL
        for (int which = 0; which < 2; ++which) FIVEDP_UNROLL
        for (int i = 0; i < Room::own_tiles; ++i)
            bring(shared.own[which][i], maps.own[which], &shared.own_landed, which,
                  (work.tile * Room::own_tiles + i) * attention_tile, work.head);
    }
    const int kv_head = work.head / (a.heads / a.kv_heads);
    Turn<Room::slots> turn;
    bool all;
    while (first_token >= 0) {
        FIVEDP_UNROLL
        for (int which = 1; which >= 0; --which) {
            Barrier* const landed = &shared.landed[turn.stage];
            wait_for_phase(&shared.used[turn.stage], turn.parity ^ 1);
            if (lane() == 0) {
                arrive_expecting(landed, Room::panels(which) * Room::panel);
                bring(shared.others[turn.stage], maps.others[which], landed, which, first_token,
                      of_keys ? others.head : kv_head);
            }
            if (of_keys) {
                const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + others.head) * a.n_queries;
                FIVEDP_UNROLL
                for (int i = lane(); i < attention_tile; i += 32)
                    shared.numbers[turn.stage][i] =
                        which == 0 ? log_sum_of(a, flat, first_token + i) : delta_of(a, flat, first_token + i);
                arrive(landed);
            }
            turn.next();
        }
        first_token = others.next(all);
    }
}

// Puts 0 where the tensors of a tile that weights are multiplied by, in these slots, are not finite: bit 0 says that
// the first was, bit 1 the second. All warps of both warpgroups, when their products with the tile as it was are done.
template <class T, bool of_keys, class Room>
FIVEDP_DEVICE int clear_spoilt(Room& shared, int first_slot, int second_slot) {
    sync_some(1, consumers);
    int found = 0;
    FIVEDP_UNROLL
    for (int which = 0; which < (of_keys ? 2 : 1); ++which) {
        char* const tile = shared.others[which == 0 ? first_slot : second_slot];
        FIVEDP_NO_UNROLL
        for (int i = thread(); i < Room::panels(which) * Room::panel / 16; i += consumers)
            found |= clear_chunk<T>(tile + 16 * i) << which;
    }
    const int first = warp_ballot((found & 1) != 0) != 0, second = warp_ballot((found & 2) != 0) != 0;
    if (lane() == 0) shared.spoilt[warp()] = first | second << 1;
    publish_to_products();
    sync_some(1, consumers);
    int any = 0;
    FIVEDP_UNROLL
    for (int w = 0; w < consumer_warps; ++w) any |= shared.spoilt[w];
    return any;
}

// sums = own other^T over so many panels, rows of k.
template <class T, class Room, int panels, int n>
FIVEDP_DEVICE void start_rows(float (&sums)[n][4], const char* own, const char* other) {
    const std::uint64_t left = swizzled_matrix(own, swizzle_bytes, 0), right = swizzled_matrix(other, swizzle_bytes, 0);
    FIVEDP_UNROLL
    for (int i = 0; i < panels * 4; ++i)
        start_product(T{}, sums, further(left, i / 4 * Room::panel + i % 4 * 32),
                      further(right, i / 4 * Room::panel + i % 4 * 32), i > 0);
}

// sums += factors times a tile from a panel on, columns of k; `factor(i)` is what its tokens 16 i .. 16 i + 15 are
// multiplied by.
template <class T, class Room, class Factor, int n>
FIVEDP_DEVICE void start_columns(float (&sums)[n][4], const Factor& factor, const char* panel) {
    const std::uint64_t right = swizzled_matrix(panel, swizzle_bytes, Room::panel);
    FIVEDP_UNROLL
    for (int i = 0; i < attention_tile / 16; ++i) start_product(T{}, sums, factor(i), further(right, i * 16 * 128));
}

// Adds `scale` times the sums to columns [first_column, end_column) of a gradient (batch, tokens, heads, size).
template <int n>
FIVEDP_DEVICE void add_to_gradient(void* gradient, const Work& work, int tokens, int heads, int size, int first_row,
                                   int first_column, int end_column, float scale, const float (&sums)[n][4]) {
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + accumulator_row(r);
        if (row >= tokens) continue;
        float* const to = static_cast<float*>(gradient) +
                          ((static_cast<std::int64_t>(work.batch) * tokens + row) * heads + work.head) * size;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            const int column = first_column + accumulator_column(c);
            if (column < end_column) to[column] += scale * sums[c / 2][2 * r + c % 2];
        }
    }
}

}  // namespace fivedp
