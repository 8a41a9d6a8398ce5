// Attention, backward, in 16 bits, for compute capability 9.x and head sizes up to 128. What is computed is said in
// attention_backward_sm80.cu, and so are the two kernels: every element is summed in one order, without atomics.
//
// A block has 128 tokens of its own, keys of a head or queries, and goes through the tiles of 64 tokens of the other
// side that the mask leaves something of: queries of all heads that share the keys, or keys. Its warps:
//
// - two warpgroups, 64 of its own tokens each: logits and d_out v^T, one product each, then weights and d_logits in the
//   registers where they arise, which are left factors as they are: gradients += d_logits (and weights) times the tile
// - a warp brings the block's tokens, then the tiles to a ring of stages (TMA), and of queries log_sum and delta
//
// Products are wgmma: the own tokens from shared memory, d_logits and weights from registers, the tile as rows of k for
// the former and as columns of k for the latter. The warpgroups share nothing but the tiles, so one's exponentials fall
// into the other's products. Where a mask cuts a tile, what is not finite in it is 0 before it is multiplied by
// weights, and what it makes of the pairs that see it is added from its rows.
//
// Shared memory: own tokens, two tensors (2 x 2 x 64, width), then stages of two tensors (64, width), all in panels of
// 64 columns, swizzled by 128 bytes (hopper.cuh): 129 KB for 128 with two stages, 99 KB for 64 with four.
//
// FLOPs: 2 (5 size + 4 v_size) a visible pair. Bytes: own tokens once, the others once for each 128 of them (most from
// L2), gradients once, read and written.
#include "cuda/attention_gradients.cuh"
#include "cuda/attention_hopper_tiles.cuh"

namespace fivedp {
namespace {

constexpr int consumers = 32 * consumer_warps;

template <int width>
struct GradientShared {
    static constexpr int stages = width > 64 ? 2 : 4, panels = width / panel_columns, panel = attention_tile * 128;
    static constexpr int bytes = panels * panel;
    char own[2][2][bytes];          // keys and values, or queries and d_out; of each warpgroup
    char others[stages][2][bytes];  // the same of the other side
    float log_sums[stages][attention_tile], deltas[stages][attention_tile];
    Barrier own_landed, landed[stages], used[stages];
    int spoilt[consumer_warps];  // bit 0: a warp found what is not finite in the first tensor, bit 1: in the second
};

// The copy engine's descriptions of the first and the second tensor of either side.
struct Maps {
    TensorMap own[2], others[2];
};

template <bool of_keys>
FIVEDP_DEVICE Work own_work(const DeviceAttention& a, int section) {
    const int heads = of_keys ? a.kv_heads : a.heads, tokens = of_keys ? a.n_keys : a.n_queries;
    return work_of(a.batch * heads, heads, section, (tokens + block_rows - 1) / block_rows, !of_keys);
}

// The tiles of the other side, for keys of all heads that share them. Every warp makes the same list by itself.
template <bool of_keys>
struct OtherTiles {
    TileWalk<!of_keys> walk;
    int head, heads_end;  // of queries

    FIVEDP_DEVICE OtherTiles(const DeviceAttention& a, const Work& work)
        : walk(a, work.tile * 2, tiles_of(of_keys ? a.n_keys : a.n_queries) - work.tile * 2 < 2 ? 1 : 2) {
        const int group = of_keys ? a.heads / a.kv_heads : 1;
        head = work.head * group;
        heads_end = head + group;
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

template <class T, int width, bool of_keys>
FIVEDP_DEVICE void bring_tiles(const DeviceAttention& a, const Work& work, OtherTiles<of_keys>& others, int first_token,
                               const Maps& maps) {
    using Room = GradientShared<width>;
    Room& shared = shared_from_boundary<Room>();
    if (lane() == 0) {
        arrive_expecting(&shared.own_landed, 4 * Room::bytes);
        FIVEDP_UNROLL
        for (int which = 0; which < 2; ++which) FIVEDP_UNROLL
        for (int group = 0; group < 2; ++group) FIVEDP_UNROLL
        for (int i = 0; i < Room::panels; ++i)
            copy_box(shared.own[which][group] + i * Room::panel, &maps.own[which], &shared.own_landed,
                     i * panel_columns, work.tile * block_rows + group * group_rows, work.head, work.batch);
    }
    const int kv_head = work.head / (a.heads / a.kv_heads);
    Turn<Room::stages> turn;
    bool all;
    while (first_token >= 0) {
        Barrier* const landed = &shared.landed[turn.stage];
        wait_for_phase(&shared.used[turn.stage], turn.parity ^ 1);
        if (lane() == 0) {
            arrive_expecting(landed, 2 * Room::bytes);
            FIVEDP_UNROLL
            for (int which = 0; which < 2; ++which) FIVEDP_UNROLL
            for (int i = 0; i < Room::panels; ++i)
                copy_box(shared.others[turn.stage][which] + i * Room::panel, &maps.others[which], landed,
                         i * panel_columns, first_token, of_keys ? others.head : kv_head, work.batch);
        }
        if (of_keys) {
            const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + others.head) * a.n_queries;
            FIVEDP_UNROLL
            for (int i = lane(); i < attention_tile; i += 32) {
                shared.log_sums[turn.stage][i] = log_sum_of(a, flat, first_token + i);
                shared.deltas[turn.stage][i] = delta_of(a, flat, first_token + i);
            }
            arrive(landed);
        }
        turn.next();
        first_token = others.next(all);
    }
}

// Puts 0 where the tensors of a tile that weights are multiplied by are not finite: bit 0 says that the first was, bit
// 1 the second. All warps of both warpgroups, when their products with the tile as it was are done.
template <class T, int width, bool of_keys>
FIVEDP_DEVICE int clear_spoilt(GradientShared<width>& shared, int stage) {
    sync_some(1, consumers);
    int found = 0;
    FIVEDP_UNROLL
    for (int which = 0; which < (of_keys ? 2 : 1); ++which) {
        FIVEDP_NO_UNROLL
        for (int i = thread(); i < GradientShared<width>::bytes / 16; i += consumers)
            found |= clear_chunk<T>(shared.others[stage][which] + 16 * i) << which;
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

// The 64 own tokens of a warpgroup: what a warp has of them is 16 rows.
template <class T, int width, bool of_keys>
FIVEDP_DEVICE void add_gradients(const DeviceAttention& a, const Bend<float>& bend, int section,
                                 OtherTiles<of_keys>& others, int first_token, bool all) {
    using Room = GradientShared<width>;
    constexpr int columns = width / 8, parts = 2, part = attention_tile / parts;
    Room& shared = shared_from_boundary<Room>();
    // What the block works on is found again where it is needed: kept, it would take the registers of sums.
    const auto work = [&] { return own_work<of_keys>(a, computed_here(section)); };
    const int group = warp() / 4, first_row = work().tile * block_rows + 16 * warp();
    const auto first_of_rows = [&](int head) {
        return (static_cast<std::int64_t>(work().batch) * a.heads + head) * a.n_queries;
    };

    float log_sum[2] = {}, delta[2] = {};  // of queries, where they are in rows
    if (!of_keys) {
        FIVEDP_UNROLL
        for (int r = 0; r < 2; ++r) {
            log_sum[r] = log_sum_of(a, first_of_rows(work().head), first_row + accumulator_row(r));
            delta[r] = delta_of(a, first_of_rows(work().head), first_row + accumulator_row(r));
        }
    }
    float sums[columns][4] = {}, v_sums[of_keys ? columns : 1][4] = {};
    const auto multiply_own = [&](float(&to)[attention_tile / 8][4], int which, int stage) {
        const std::uint64_t own = swizzled_matrix(shared.own[which][group], swizzle_bytes, 0);
        const std::uint64_t other = swizzled_matrix(shared.others[stage][which], swizzle_bytes, 0);
        FIVEDP_UNROLL
        for (int i = 0; i < width / 16; ++i)
            start_product(T{}, to, further(own, i / 4 * Room::panel + i % 4 * 32),
                          further(other, i / 4 * Room::panel + i % 4 * 32), i > 0);
    };
    const auto add_product = [&](auto& to, const std::uint32_t(&factors)[attention_tile / 16][4], int which,
                                 int stage) {
        const std::uint64_t other = swizzled_matrix(shared.others[stage][which], swizzle_bytes, Room::panel);
        FIVEDP_UNROLL
        for (int i = 0; i < attention_tile / 16; ++i) start_product(T{}, to, factors[i], further(other, i * 16 * 128));
        commit_products();
    };
    const auto pack = [](const float(&from)[attention_tile / 8][4], std::uint32_t(&to)[attention_tile / 16][4]) {
        as_factors<T>(reinterpret_cast<const float(&)[1][attention_tile / 8][4]>(from),
                      reinterpret_cast<std::uint32_t(&)[1][attention_tile / 16][4]>(to));
    };

    Turn<Room::stages> turn;
    wait_for_phase(&shared.own_landed, 0);
    while (first_token >= 0) {
        const int stage = turn.stage;
        wait_for_phase(&shared.landed[stage], turn.parity);
        float logits[attention_tile / 8][4], d_weights[attention_tile / 8][4];
        open_products();
        multiply_own(logits, 0, stage);
        multiply_own(d_weights, 1, stage);
        commit_products();
        wait_for_products<0>();
        settle(logits);
        settle(d_weights);
        const int spoilt = all ? 0 : clear_spoilt<T, width, of_keys>(shared, stage);

        FIVEDP_UNROLL
        for (int h = 0; h < parts; ++h)
            unweigh<!of_keys>(
                a, bend, [&] { return of_keys ? others.head : work().head; }, all, first_row, first_token + h * part,
                [&](int r, int c) {
                    return of_keys ? shared.log_sums[stage][h * part + accumulator_column(c)] : log_sum[r];
                },
                [&](int r, int c) {
                    return of_keys ? shared.deltas[stage][h * part + accumulator_column(c)] : delta[r];
                },
                reinterpret_cast<float(&)[1][part / 8][4]>(logits[h * part / 8]),
                reinterpret_cast<float(&)[1][part / 8][4]>(d_weights[h * part / 8]));

        std::uint32_t factors[attention_tile / 16][4], d_factors[attention_tile / 16][4];
        pack(logits, factors);
        pack(d_weights, d_factors);
        if (spoilt != 0) {
            const Work here = work();
            if constexpr (of_keys) {
                if ((spoilt & 2) != 0)
                    add_spoilt<T, false, false>(a, head_rows<T>(a.d_out, here.batch, others.head), a.d_out.token,
                                                a.v_size, first_token, attention_tile, first_row, v_sums);
                if ((spoilt & 1) != 0)
                    add_spoilt<T, false, true>(a, head_rows<T>(a.q, here.batch, others.head), a.q.token, a.size,
                                               first_token, attention_tile, first_row, sums);
            } else {
                const int kv_head = here.head / (a.heads / a.kv_heads);
                add_spoilt<T, true, true>(a, head_rows<T>(a.k, here.batch, kv_head), a.k.token, a.size, first_token,
                                          attention_tile, first_row, sums);
            }
        }
        settle(sums);
        settle(d_factors);
        if (of_keys) {
            settle(v_sums);
            settle(factors);
        }
        open_products();
        if constexpr (of_keys) add_product(v_sums, factors, 1, stage);
        add_product(sums, d_factors, 0, stage);
        wait_for_products<0>();
        settle(sums);
        settle(d_factors);
        if (of_keys) {
            settle(v_sums);
            settle(factors);
        }
        if (lane() == 0) arrive(&shared.used[stage]);
        turn.next();
        first_token = others.next(all);
    }

    const Work mine = work();
    const float scale = static_cast<float>(a.scale);
    const int tokens = of_keys ? a.n_keys : a.n_queries, heads = of_keys ? a.kv_heads : a.heads;
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + accumulator_row(r);
        if (row >= tokens) continue;
        const std::int64_t flat = (static_cast<std::int64_t>(mine.batch) * tokens + row) * heads + mine.head;
        float* const to = static_cast<float*>(of_keys ? a.d_k : a.d_q) + flat * a.size;
        float* const to_v = static_cast<float*>(a.d_v) + flat * a.v_size;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = accumulator_column(c);
            if (column < a.size) to[column] += scale * sums[c / 2][2 * r + c % 2];
            if constexpr (of_keys)
                if (column < a.v_size) to_v[column] += v_sums[c / 2][2 * r + c % 2];
        }
    }
}

template <class T, int width, bool of_keys>
FIVEDP_KERNEL(hopper_threads, 1)
gradients_wgmma(const DeviceAttention a, const Bend<float> bend, const int section,
                const FIVEDP_GRID_CONSTANT Maps maps) {
#ifdef FIVEDP_HOPPER
    using Room = GradientShared<width>;
    const Work work = own_work<of_keys>(a, section);
    OtherTiles<of_keys> others(a, work);
    bool all = false;
    const int first_token = others.next(all);
    if (first_token < 0) return;

    if (thread() == 0) {
        Room& shared = shared_from_boundary<Room>();
        init_barrier(&shared.own_landed, 1);
        for (int stage = 0; stage < Room::stages; ++stage) {
            init_barrier(&shared.landed[stage], of_keys ? 33 : 1);  // the copies, and a warp's log_sums and deltas
            init_barrier(&shared.used[stage], consumer_warps);
        }
        publish_barriers();
    }
    sync_block();
    if (warp() < consumer_warps) {
        raise_registers<consumer_registers>();
        add_gradients<T, width, of_keys>(a, bend, section, others, first_token, all);
    } else {
        lower_registers<copying_registers>();
        if (warp() == consumer_warps) bring_tiles<T, width, of_keys>(a, work, others, first_token, maps);
    }
#else
    trap();
#endif
}

template <class T, int width>
bool start(const DeviceAttention& a, Stream stream) {
    BoxedTensor q, k, v, d_out;
    if (!boxed(a, a.q, a.n_queries, a.heads, a.size, attention_tile, q) ||
        !boxed(a, a.k, a.n_keys, a.kv_heads, a.size, attention_tile, k) ||
        !boxed(a, a.v, a.n_keys, a.kv_heads, a.v_size, attention_tile, v) ||
        !boxed(a, a.d_out, a.n_queries, a.heads, a.v_size, attention_tile, d_out) ||
        !built_for_hopper(gradients_wgmma<T, width, true>))
        return false;
    const Maps of_keys = {{tensor_map(k), tensor_map(v)}, {tensor_map(q), tensor_map(d_out)}};
    const Maps of_queries = {{tensor_map(q), tensor_map(d_out)}, {tensor_map(k), tensor_map(v)}};
    const int group = a.heads / a.kv_heads, bytes = sizeof(GradientShared<width>) + swizzle_bytes;
    const std::int64_t row_bytes = std::int64_t{2} * (a.size + a.v_size);
    const std::int64_t key_blocks = (a.n_keys + block_rows - 1) / block_rows;
    const std::int64_t query_blocks = (a.n_queries + block_rows - 1) / block_rows;
    launch(gradients_wgmma<T, width, true>, key_blocks * a.batch * a.kv_heads, 1, 1, hopper_threads, bytes, stream, a,
           bend_of<float>(a), heads_of_section(row_bytes * a.n_queries * group), of_keys);
    launch(gradients_wgmma<T, width, false>, query_blocks * a.batch * a.heads, 1, 1, hopper_threads, bytes, stream, a,
           bend_of<float>(a), heads_of_section(row_bytes * a.n_keys) * group, of_queries);
    return true;
}

template <class T>
bool start_padded(const DeviceAttention& a, Stream stream) {
    const int size = a.size > a.v_size ? a.size : a.v_size;
    if (size > 128) return false;
    return size <= 64 ? start<T, 64>(a, stream) : start<T, 128>(a, stream);
}

}  // namespace

bool attention_backward_sm90(const DeviceAttention& a, Stream stream) {
    if (compute_capability() / 10 != 9) return false;
    return a.type == DeviceType::bf16 ? start_padded<Bf16>(a, stream) : start_padded<Half>(a, stream);
}

}  // namespace fivedp
