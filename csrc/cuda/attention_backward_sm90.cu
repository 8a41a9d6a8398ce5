// Attention, backward, in 16 bits, for compute capability 9.x: d_q, and for head sizes up to 128 d_k and d_v; above,
// these are made in attention_backward_wide_sm90.cu. What is computed is said in attention_backward_sm80.cu, and so are
// the two kernels: every element is summed in one order, without atomics.
//
// A block has 128 tokens of its own, keys of a head or queries, and goes through the tiles of 64 tokens of the other
// side that the mask leaves something of: queries of all heads that share the keys, or keys. Its warps:
//
// - two warpgroups, 64 of its own tokens each: logits and d_out v^T, one product each, then weights and d_logits in the
//   registers where they arise, which are left factors as they are: gradients += d_logits (and weights) times the tile
// - a warp brings the block's tokens, then the tiles to a ring (TMA), and of queries log_sum and delta
//
// Products are wgmma: the own tokens from shared memory, d_logits and weights from registers, the tile as rows of k for
// the former and as columns of k for the latter. The warpgroups share nothing but the tiles, so one's exponentials fall
// into the other's products. Where a mask cuts a tile, what is not finite in it is 0 before it is multiplied by
// weights, and what it makes of the pairs that see it is added from its rows.
//
// Shared memory: own tokens, two tensors (2 x 2 x 64, width), then a ring of slots (64, width), two for a tile, all in
// panels of 64 columns, swizzled by 128 bytes (hopper.cuh): 99 KB for 64 with eight slots; with four 130 KB for 128 and
// 194 KB for 192; 226 KB for 256 with three. There, values come to the slot of the keys before, and keys to that of the
// values, which are done with as soon as d_weights are there.
//
// Registers at 256: sums 128, logits and d_weights 32 + 32 a thread.
//
// FLOPs: 2 (4 size + 3 v_size) a visible pair. Bytes: own tokens once, the others once for each 128 of them (most from
// L2), gradients once, read and written.
#include "cuda/attention_hopper_gradients.cuh"

namespace fivedp {
namespace {

constexpr int ring_slots(int width, int v_width) {
    const int wider = width > v_width ? width : v_width;
    return wider > 192 ? 3 : wider > 64 ? 4 : 8;
}
template <int width, int v_width>
struct GradientShared : GradientTiles<width, v_width, 2, ring_slots(width, v_width)>,
                        GradientRing<ring_slots(width, v_width)> {};
static_assert(sizeof(GradientShared<256, 256>) + swizzle_bytes <= 227 * 1024);

// The 64 own tokens of a warpgroup: what a warp has of them is 16 rows.
template <class T, int width, int v_width, bool of_keys>
FIVEDP_DEVICE void add_gradients(const DeviceAttention& a, const Bend<float>& bend, int section,
                                 OtherTiles<GradientShared<width, v_width>, of_keys>& others, int first_token,
                                 bool all) {
    using Room = GradientShared<width, v_width>;
    // Where sums take most registers, weights are made of fewer pairs at a time.
    constexpr int columns = width / 8, parts = width > 192 ? 4 : 2, part = attention_tile / parts;
    Room& shared = shared_from_boundary<Room>();
    // What the block works on is found again where it is needed: kept, it would take the registers of sums.
    const auto work = [&] { return own_work<Room, of_keys>(a, computed_here(section)); };
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
    float sums[columns][4] = {}, v_sums[of_keys ? v_width / 8 : 1][4] = {};
    const auto pack = [](const float(&from)[attention_tile / 8][4], std::uint32_t(&to)[attention_tile / 16][4]) {
        as_factors<T>(reinterpret_cast<const float(&)[1][attention_tile / 8][4]>(from),
                      reinterpret_cast<std::uint32_t(&)[1][attention_tile / 16][4]>(to));
    };
    const auto release = [&](int slot) {
        if (lane() == 0) arrive(&shared.used[slot]);
    };

    Turn<Room::slots> turn;
    wait_for_phase(&shared.own_landed, 0);
    while (first_token >= 0) {
        const int second = turn.stage;
        wait_for_phase(&shared.landed[second], turn.parity);
        turn.next();
        const int first = turn.stage;
        wait_for_phase(&shared.landed[first], turn.parity);
        turn.next();
        float logits[attention_tile / 8][4], d_weights[attention_tile / 8][4];
        open_products();
        start_rows<T, Room, Room::panels(0)>(logits, shared.own[0][group], shared.others[first]);
        start_rows<T, Room, Room::panels(1)>(d_weights, shared.own[1][group], shared.others[second]);
        commit_products();
        wait_for_products<0>();
        settle(logits);
        settle(d_weights);
        if (!of_keys) release(second);
        const int spoilt = all ? 0 : clear_spoilt<T, of_keys>(shared, first, second);

        FIVEDP_UNROLL
        for (int h = 0; h < parts; ++h)
            unweigh<!of_keys>(
                a, bend, [&] { return of_keys ? others.head : work().head; }, all, first_row, first_token + h * part,
                [&](int r, int c) {
                    return of_keys ? shared.numbers[first][h * part + accumulator_column(c)] : log_sum[r];
                },
                [&](int r, int c) {
                    return of_keys ? shared.numbers[second][h * part + accumulator_column(c)] : delta[r];
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
        using Factor = const std::uint32_t(&)[4];
        open_products();
        if constexpr (of_keys)
            start_columns<T, Room>(
                v_sums, [&](int i) -> Factor { return factors[i]; }, shared.others[second]);
        start_columns<T, Room>(
            sums, [&](int i) -> Factor { return d_factors[i]; }, shared.others[first]);
        commit_products();
        wait_for_products<0>();
        settle(sums);
        settle(d_factors);
        if (of_keys) {
            settle(v_sums);
            settle(factors);
            release(second);
        }
        release(first);
        first_token = others.next(all);
    }

    const Work mine = work();
    const int tokens = of_keys ? a.n_keys : a.n_queries, heads = of_keys ? a.kv_heads : a.heads;
    add_to_gradient(of_keys ? a.d_k : a.d_q, mine, tokens, heads, a.size, first_row, 0, a.size,
                    static_cast<float>(a.scale), sums);
    if constexpr (of_keys) add_to_gradient(a.d_v, mine, tokens, heads, a.v_size, first_row, 0, a.v_size, 1.0f, v_sums);
}

template <class T, int width, int v_width, bool of_keys>
FIVEDP_KERNEL(hopper_threads, 1)
gradients_wgmma(const DeviceAttention a, const Bend<float> bend, const int section,
                const FIVEDP_GRID_CONSTANT GradientMaps maps) {
#ifdef FIVEDP_HOPPER
    using Room = GradientShared<width, v_width>;
    const Work work = own_work<Room, of_keys>(a, section);
    OtherTiles<Room, of_keys> others(a, work);
    bool all = false;
    const int first_token = others.next(all);
    if (first_token < 0) return;

    if (thread() == 0) init_gradient_barriers<Room, of_keys>();
    sync_block();
    if (warp() < consumer_warps) {
        raise_registers<consumer_registers>();
        add_gradients<T, width, v_width, of_keys>(a, bend, section, others, first_token, all);
    } else {
        lower_registers<copying_registers>();
        if (warp() == consumer_warps) bring_gradient_tiles<Room, of_keys>(a, work, others, first_token, maps);
    }
#else
    trap();
#endif
}

template <class T, int width, int v_width>
bool start(const DeviceAttention& a, Stream stream) {
    BoxedTensor q, k, v, d_out;
    if (!boxed(a, a.q, a.n_queries, a.heads, a.size, attention_tile, q) ||
        !boxed(a, a.k, a.n_keys, a.kv_heads, a.size, attention_tile, k) ||
        !boxed(a, a.v, a.n_keys, a.kv_heads, a.v_size, attention_tile, v) ||
        !boxed(a, a.d_out, a.n_queries, a.heads, a.v_size, attention_tile, d_out) ||
        !built_for_hopper(gradients_wgmma<T, width, v_width, false>))
        return false;
    const GradientMaps of_keys = {{tensor_map(k), tensor_map(v)}, {tensor_map(q), tensor_map(d_out)}};
    const GradientMaps of_queries = {{tensor_map(q), tensor_map(d_out)}, {tensor_map(k), tensor_map(v)}};
    const int group = a.heads / a.kv_heads, bytes = sizeof(GradientShared<width, v_width>) + swizzle_bytes;
    const std::int64_t row_bytes = std::int64_t{2} * (a.size + a.v_size);
    const std::int64_t key_blocks = (a.n_keys + block_rows - 1) / block_rows;
    const std::int64_t query_blocks = (a.n_queries + block_rows - 1) / block_rows;
    if constexpr (width > 128 || v_width > 128) {
        if (!wide_key_gradients_sm90(a, of_keys, stream)) return false;
    } else {
        launch(gradients_wgmma<T, width, v_width, true>, key_blocks * a.batch * a.kv_heads, 1, 1, hopper_threads, bytes,
               stream, a, bend_of<float>(a), heads_of_section(row_bytes * a.n_queries * group), of_keys);
    }
    launch(gradients_wgmma<T, width, v_width, false>, query_blocks * a.batch * a.heads, 1, 1, hopper_threads, bytes,
           stream, a, bend_of<float>(a), heads_of_section(row_bytes * a.n_keys) * group, of_queries);
    return true;
}

template <class T>
bool start_padded(const DeviceAttention& a, Stream stream) {
    const int size = a.size > a.v_size ? a.size : a.v_size;
    if (size <= 64) return start<T, 64, 64>(a, stream);
    if (size <= 128) return start<T, 128, 128>(a, stream);
    return with_wide_shape(a, [&](auto width, auto v_width) { return start<T, width, v_width>(a, stream); });
}

}  // namespace

bool attention_backward_sm90(const DeviceAttention& a, Stream stream) {
    if (compute_capability() / 10 != 9) return false;
    return a.type == DeviceType::bf16 ? start_padded<Bf16>(a, stream) : start_padded<Half>(a, stream);
}

}  // namespace fivedp
