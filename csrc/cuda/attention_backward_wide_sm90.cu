// d_k and d_v of attention in 16 bits, for compute capability 9.x and head sizes above 128. What is computed is said in
// attention_backward_sm80.cu, d_q is made in attention_backward_sm90.cu; as there, every element is summed in one
// order, without atomics. The sizes of keys and of values are padded each by itself, to 128, 192 or 256.
//
// The sums of 64 keys are as many registers as a warpgroup has, so two share 64 keys. A block goes through the tiles of
// 64 queries, of all heads that share its keys. Of each tile a warpgroup
//
// - makes logits^T and (d_out v^T)^T of its 32 queries, and of these weights^T and d_logits^T, keys in rows; weights
//   while d_out v^T is under way,
// - writes both to shared memory in 16 bits, where the warpgroups together make (64 keys, 64 queries), and meets the
//   other one,
// - adds weights^T d_out and d_logits^T q to its columns: half of the panels of 64 of d_k, and half of those of d_v.
//
// So nothing is multiplied twice, and what is exchanged is what products would have been rounded to anyway. There are
// two places for it: a warpgroup that writes for the next tile may be ahead of the other one's products with this tile,
// but not of those with the one before. Where a panel is left over, that of d_k is the first warpgroup's, that of d_v
// the second's. One more warp brings the keys, then the tiles to a ring (TMA).
//
// Products are wgmma: keys and values from shared memory, weights^T and d_logits^T too, a tile as rows of k for the
// former and as columns of k for the latter. What is not finite is treated as in attention_backward_sm90.cu.
//
// Registers at 256: sums 64 + 64, logits, d_weights and derivatives of the softcap 16 each a thread. Shared memory: own
// tokens 64 KB, two tiles of queries and d_out 128 KB, two places of weights^T and d_logits^T 32 KB, 226 KB in all.
//
// FLOPs: 2 (2 size + 2 v_size) a visible pair. Bytes: keys once, queries once for each 64 keys (most from L2: 32 bytes
// for each cycle in which the tensor cores are busy, which is near what L2 can give), gradients once, read and written.
#include "cuda/attention_hopper_gradients.cuh"

namespace fivedp {
namespace {

constexpr int group_tokens = attention_tile / 2;

// (64 keys, 64 queries) as wgmma reads rows of k: a panel.
struct FactorTiles {
    char factors[2][2][attention_tile * 128];  // of two tiles; weights and d_logits
};
template <int width, int v_width>
struct KeysShared : GradientTiles<width, v_width, 1, 4>, FactorTiles, GradientRing<4> {};
static_assert(sizeof(KeysShared<256, 256>) + swizzle_bytes <= 227 * 1024);

// The columns of d_k (`which` is 0) or d_v (1) that a warpgroup makes, of which `most` panels is what either may have.
template <class Room, int which>
struct Columns {
    static constexpr int panels = Room::panels(which), most = (panels + 1) / 2;
    static constexpr bool even = panels % 2 == 0;
    int first, count;  // panels

    FIVEDP_DEVICE explicit Columns(int group) {
        constexpr int of_first = (panels + 1 - which) / 2;
        first = group == 0 ? 0 : of_first;
        count = group == 0 ? of_first : panels - of_first;
    }
    FIVEDP_DEVICE int begin() const { return first * panel_columns; }
    FIVEDP_DEVICE int end(int size) const {
        const int of_panels = (first + count) * panel_columns;
        return of_panels < size ? of_panels : size;
    }
};

// Accumulators of 16 rows and 32 columns to rows `first_row` and following, columns from `first_column`, of a panel.
template <class T>
FIVEDP_DEVICE void write_factors(char* panel, int first_row, int first_column,
                                 const float (&values)[group_tokens / 8][4]) {
    FIVEDP_UNROLL
    for (int j = 0; j < group_tokens / 8; ++j) FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + accumulator_row(r), chunk = (first_column / 8 + j) ^ (row & 7);
        *reinterpret_cast<std::uint32_t*>(panel + row * 128 + chunk * 16 + 4 * (lane() % 4)) =
            pack_pair<T>(values[j][2 * r], values[j][2 * r + 1]);
    }
}

// sums += factors tile, in the columns of this warpgroup.
template <class T, class Room, int which, int n>
FIVEDP_DEVICE void start_my_columns(float (&sums)[n][4], int group, const char* factors, const char* tile) {
    using Mine = Columns<Room, which>;
    constexpr int of_panel = panel_columns / 8;
    const Mine mine(group);
    const std::uint64_t left = swizzled_matrix(factors, swizzle_bytes, 0);
    const auto factor = [&](int i) { return further(left, i * 32); };
    const char* const panel = tile + mine.first * Room::panel;
    if (Mine::even || mine.count == Mine::most) {
        start_columns<T, Room>(sums, factor, panel);
    } else if constexpr (Mine::most > 1) {
        constexpr int fewer = (Mine::most - 1) * of_panel;
        start_columns<T, Room>(reinterpret_cast<float(&)[fewer][4]>(sums), factor, panel);
    }
}

template <class T, class Room>
FIVEDP_DEVICE void add_key_gradients(const DeviceAttention& a, const Bend<float>& bend, int section,
                                     OtherTiles<Room, true>& others, int first_token, bool all) {
    using OfKeys = Columns<Room, 0>;
    using OfValues = Columns<Room, 1>;
    Room& shared = shared_from_boundary<Room>();
    // What the block works on is found again where it is needed: kept, it would take the registers of sums.
    const auto work = [&] { return own_work<Room, true>(a, computed_here(section)); };
    const int group = warp() / 4, row_of_block = 16 * (warp() % 4);

    float d_k[OfKeys::most * panel_columns / 8][4] = {}, d_v[OfValues::most * panel_columns / 8][4] = {};
    Turn<Room::slots> turn;
    int place = 0;
    wait_for_phase(&shared.own_landed, 0);
    while (first_token >= 0) {
        const int second = turn.stage, first = second + 1;
        wait_for_phase(&shared.landed[second], turn.parity);
        wait_for_phase(&shared.landed[first], turn.parity);
        turn.next();
        turn.next();
        float logits[group_tokens / 8][4], d_weights[group_tokens / 8][4];
        const int rows = group * group_tokens * 128;  // of this warpgroup's queries, in a panel
        open_products();
        start_rows<T, Room, Room::panels(0)>(logits, shared.own[0][0], shared.others[first] + rows);
        commit_products();
        start_rows<T, Room, Room::panels(1)>(d_weights, shared.own[1][0], shared.others[second] + rows);
        commit_products();

        // Weights are made while d_weights are under way.
        wait_for_products<1>();
        settle(logits);
        const int first_row = work().tile * attention_tile + row_of_block;
        const auto number = [&](int slot, int c) {
            return shared.numbers[slot][group * group_tokens + accumulator_column(c)];
        };
        float derivatives[group_tokens / 8][4];
        std::uint32_t bits[1];
        weigh_pairs<false>(
            a, bend, [&] { return others.head; }, all, first_row, first_token + group * group_tokens,
            [&](int, int c) { return number(first, c); },
            [&](int r, int c, float derivative) { derivatives[c / 2][2 * r + c % 2] = derivative; },
            reinterpret_cast<float(&)[1][group_tokens / 8][4]>(logits), bits);
        wait_for_products<0>();
        settle(d_weights);
        FIVEDP_UNROLL
        for (int c = 0; c < group_tokens / 4; ++c) FIVEDP_UNROLL
        for (int r = 0; r < 2; ++r) {
            const int e = 2 * r + c % 2;
            float& d = d_weights[c / 2][e];
            d -= number(second, c);
            if (bend.bent) d *= derivatives[c / 2][e];
            d = visible(bits, r, c) ? logits[c / 2][e] * d : 0.0f;
        }
        const int spoilt = all ? 0 : clear_spoilt<T, true>(shared, first, second);
        write_factors<T>(shared.factors[place][0], row_of_block, group * group_tokens, logits);
        write_factors<T>(shared.factors[place][1], row_of_block, group * group_tokens, d_weights);
        publish_to_products();
        if ((spoilt & 1) != 0) {
            const OfKeys mine(group);
            add_spoilt<T, false, true>(a, head_rows<T>(a.q, work().batch, others.head) + mine.begin(), a.q.token,
                                       mine.end(a.size) - mine.begin(), first_token, attention_tile, first_row, d_k);
        }
        if ((spoilt & 2) != 0) {
            const OfValues mine(group);
            add_spoilt<T, false, false>(a, head_rows<T>(a.d_out, work().batch, others.head) + mine.begin(),
                                        a.d_out.token, mine.end(a.v_size) - mine.begin(), first_token, attention_tile,
                                        first_row, d_v);
        }
        sync_some(1, consumers);

        settle(d_k);
        settle(d_v);
        open_products();
        start_my_columns<T, Room, 1>(d_v, group, shared.factors[place][0], shared.others[second]);
        start_my_columns<T, Room, 0>(d_k, group, shared.factors[place][1], shared.others[first]);
        commit_products();
        wait_for_products<0>();
        settle(d_k);
        settle(d_v);
        if (lane() == 0) {
            arrive(&shared.used[second]);
            arrive(&shared.used[first]);
        }
        place ^= 1;
        first_token = others.next(all);
    }

    const Work to = work();
    const int first_row = to.tile * attention_tile + row_of_block;
    const OfKeys of_keys(group);
    const OfValues of_values(group);
    add_to_gradient(a.d_k, to, a.n_keys, a.kv_heads, a.size, first_row, of_keys.begin(), of_keys.end(a.size),
                    static_cast<float>(a.scale), d_k);
    add_to_gradient(a.d_v, to, a.n_keys, a.kv_heads, a.v_size, first_row, of_values.begin(), of_values.end(a.v_size),
                    1.0f, d_v);
}

template <class T, int width, int v_width>
FIVEDP_KERNEL(hopper_threads, 1)
key_gradients_wgmma(const DeviceAttention a, const Bend<float> bend, const int section,
                    const FIVEDP_GRID_CONSTANT GradientMaps maps) {
#ifdef FIVEDP_HOPPER
    using Room = KeysShared<width, v_width>;
    const Work work = own_work<Room, true>(a, section);
    OtherTiles<Room, true> others(a, work);
    bool all = false;
    const int first_token = others.next(all);
    if (first_token < 0) return;

    if (thread() == 0) init_gradient_barriers<Room, true>();
    sync_block();
    if (warp() < consumer_warps) {
        raise_registers<consumer_registers>();
        add_key_gradients<T, Room>(a, bend, section, others, first_token, all);
    } else {
        lower_registers<copying_registers>();
        if (warp() == consumer_warps) bring_gradient_tiles<Room, true>(a, work, others, first_token, maps);
    }
#else
    trap();
#endif
}

template <class T, int width, int v_width>
bool start(const DeviceAttention& a, const GradientMaps& maps, Stream stream) {
    if (!built_for_hopper(key_gradients_wgmma<T, width, v_width>)) return false;
    const std::int64_t row_bytes = std::int64_t{2} * (a.size + a.v_size);
    launch(key_gradients_wgmma<T, width, v_width>, static_cast<std::int64_t>(tiles_of(a.n_keys)) * a.batch * a.kv_heads,
           1, 1, hopper_threads, sizeof(KeysShared<width, v_width>) + swizzle_bytes, stream, a, bend_of<float>(a),
           heads_of_section(row_bytes * a.n_queries * (a.heads / a.kv_heads)), maps);
    return true;
}

}  // namespace

bool wide_key_gradients_sm90(const DeviceAttention& a, const GradientMaps& maps, Stream stream) {
    return with_wide_shape(a, [&](auto width, auto v_width) {
        return a.type == DeviceType::bf16 ? start<Bf16, width, v_width>(a, maps, stream)
                                          : start<Half, width, v_width>(a, maps, stream);
    });
}

}  // namespace fivedp
