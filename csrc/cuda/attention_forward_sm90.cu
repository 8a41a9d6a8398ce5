// Attention, forward, in 16 bits, for compute capability 9.x: adds some keys to the state of some queries.
//
// A block has 128 queries of one head and goes through the tiles of 128 keys (64 where the head size is above 128) that
// the mask leaves something of, from the last to the first. Its warps have three kinds of work:
//
// - two warpgroups, 64 queries each: logits = q k^T, weights = 2^(logits - highest), output = factor output + weights v
// - a warp brings the queries, then keys and values to a ring of stages (TMA)
// - three warps look for NaN and infinity in values of which only some pairs are visible
//
// Products are wgmma: the queries from shared memory, the weights from the registers where they arise, the keys as rows
// of k, the values as columns of k. A warpgroup issues logits of the next tile, then the output of this one, and makes
// weights of the former while the latter is under way; the two warpgroups issue in turns, so that one's exponentials
// fall into the other's products. Registers are moved from the copying warps to the multiplying ones.
//
// Shared memory: queries (2 x 64, width), then stages of keys and of values (keys, width), all in panels of 64 columns,
// swizzled by 128 bytes (hopper.cuh); 161 KB for 128 with two stages, 145 KB for 64 with four, 193 KB for 256 with two
// stages of 64 keys. One block a multiprocessor. Head sizes are padded to 64, 128 or 256 with zeros by the copy engine.
//
// Barriers of a stage: `landed` when the bytes are there, `free` when all eight multiplying warps are done with it; for
// values also `checked`, when the three warps have seen them: what is not finite is 0 in shared memory then, and the
// multiplying warps add what it makes of the pairs that do see it.
//
// FLOPs: 2 (size + v_size) a visible pair. Bytes: q once, k and v once for each 128 queries (most of them from L2), and
// the state once; a row that has seen no key yet is not read. The state is that of attention_forward_sm80.cu.
//
// The online softmax is that of Milakov and Gimelshein (2018), the turns and the overlap within a warpgroup those of
// FlashAttention-3 (Shah et al., 2024).
#include "cuda/attention_hopper_tiles.cuh"
#include "cuda/attention_online.cuh"

namespace fivedp {
namespace {

// Two rows of logits become weights; `factor` is what the sums so far are multiplied by. Returns whether any lane's is
// not 1.
template <int n>
FIVEDP_DEVICE bool weigh(float (&logits)[n][4], float scale, float (&highest)[2], float (&total)[2],
                         float (&factor)[2]) {
    const float lowest = bits_as_float(0xff800000u);
    bool higher = false;
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        float top = lowest;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) top = fmaxf(top, logits[c / 2][2 * r + c % 2]);  // NaN stays in its weight
        top = fmaxf(top, warp_xor(top, 1));
        top = fmaxf(fmaxf(top, warp_xor(top, 2)) * scale, highest[r]);
        // Rows that have seen nothing yet: -inf - -inf would be NaN.
        const float from = top == lowest ? 0.0f : top;
        factor[r] = top == highest[r] ? 1.0f : fast_exp2(highest[r] - from);
        higher = higher || factor[r] != 1.0f;
        highest[r] = top;
        total[r] *= factor[r];
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            float& x = logits[c / 2][2 * r + c % 2];
            x = fast_exp2(fmaf(x, scale, -from));
            total[r] += x;
        }
    }
    return warp_ballot(higher) != 0;
}

// The 64 queries of a warpgroup: what a warp has of them is 16 rows.
template <class T, int width>
FIVEDP_DEVICE void attend(const DeviceAttention& a, const Bend<float>& bend, const Block& block,
                          KeyWalk<Tiles<width>::halves>& walk, int first_key, std::uint32_t whole) {
    using Tile = Tiles<width>;
    constexpr int columns = width / 8, all_halves = (1 << Tile::halves) - 1;
    Shared<width>& shared = shared_of_block<width>();
    const int group = warp() / 4;
    const auto first_row = [&] { return computed_here(block.first_query) + 16 * warp(); };

    const float lowest = bits_as_float(0xff800000u);
    float highest[2], total[2], factor[2], output[columns][4];
    const StateRows before(a, block.work);
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row() + accumulator_row(r);
        highest[r] = row < a.n_queries ? before.highest[row] : lowest;
        total[r] = row < a.n_queries && lane() % 4 == 0 ? before.total[row] : 0.0f;  // this thread's share of a row
        const float* const output_row = before.output + row * before.token;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = accumulator_column(c);
            output[c / 2][2 * r + c % 2] = highest[r] != lowest && column < a.v_size ? output_row[column] : 0.0f;
        }
    }

    // Products are issued by one warpgroup after the other; the first of them has the first turn.
    const auto wait_for_turn = [&] { sync_some(1 + group, 256); };
    const auto give_turn = [&] { arrive_some(2 - group, 256); };
    if (group == 1) give_turn();

    Turn<Tile::stages> key_turn, value_turn;
    float logits[Tile::keys / 8][4];
    std::uint32_t weights[Tile::keys / 16][4];
    const auto start_logits = [&] {
        const std::uint64_t q = swizzled_matrix(shared.queries[group], swizzle_bytes, 0);
        const std::uint64_t k = swizzled_matrix(shared.keys[key_turn.stage], swizzle_bytes, 0);
        FIVEDP_UNROLL
        for (int i = 0; i < width / 16; ++i)
            start_product(T{}, logits, further(q, i / 4 * Tile::q_panel + i % 4 * 32),
                          further(k, i / 4 * Tile::panel + i % 4 * 32), i > 0);
        commit_products();
    };
    const auto start_output = [&] {
        const std::uint64_t v = swizzled_matrix(shared.values[value_turn.stage], swizzle_bytes, Tile::panel);
        FIVEDP_UNROLL
        for (int i = 0; i < Tile::keys / 16; ++i) start_product(T{}, output, weights[i], further(v, i * 16 * 128));
        commit_products();
    };
    const auto release = [&](Barrier* free) {
        if (lane() == 0) arrive(free);
    };
    // Of the tile whose logits have arrived; weights stay where logits were until the last product has read its own.
    const auto weigh_tile = [&] {
        FIVEDP_UNROLL
        for (int h = 0; h < Tile::halves; ++h)
            finish_logits(a, bend, block.work.head, (whole >> h & 1) != 0, first_row(), first_key + h * attention_tile,
                          reinterpret_cast<float(&)[1][8][4]>(logits[8 * h]));
        return weigh(logits, bend.factor, highest, total, factor);
    };
    const auto rescale_and_pack = [&](bool higher) {
        if (higher) {
            FIVEDP_UNROLL
            for (int c = 0; c < 2 * columns; ++c) FIVEDP_UNROLL
            for (int r = 0; r < 2; ++r) output[c / 2][2 * r + c % 2] *= factor[r];
        }
        FIVEDP_UNROLL
        for (int h = 0; h < Tile::halves; ++h)
            as_factors<T>(reinterpret_cast<const float(&)[1][8][4]>(logits[8 * h]),
                          reinterpret_cast<std::uint32_t(&)[1][4][4]>(weights[4 * h]));
    };
    // The values of the tile of which there are weights now.
    const auto wait_for_values = [&] {
        wait_for_phase(&shared.values_checked[value_turn.stage], value_turn.parity);
        if (whole == all_halves) return;
        bool spoilt = false;
        FIVEDP_UNROLL
        for (int w = 0; w < checking_warps; ++w) spoilt = spoilt || shared.spoilt[value_turn.stage][w] != 0;
        if (spoilt)
            add_spoilt<T, true, false>(a, head_rows<T>(a.v, block.work.batch, block.kv_head), a.v.token, a.v_size,
                                       first_key, Tile::keys, first_row(), output);
    };

    wait_for_phase(&shared.queries_landed, 0);
    wait_for_phase(&shared.keys_landed[0], 0);
    wait_for_turn();
    open_products();
    start_logits();
    give_turn();
    wait_for_products<0>();
    settle(logits);
    release(&shared.keys_free[0]);
    key_turn.next();
    rescale_and_pack(weigh_tile());

    for (;;) {
        wait_for_values();
        first_key = walk.next(whole);
        if (first_key < 0) break;
        wait_for_phase(&shared.keys_landed[key_turn.stage], key_turn.parity);
        wait_for_turn();
        settle(output);
        settle(weights);
        open_products();
        start_logits();
        start_output();
        give_turn();

        wait_for_products<1>();
        settle(logits);
        release(&shared.keys_free[key_turn.stage]);
        key_turn.next();
        const bool higher = weigh_tile();

        wait_for_products<0>();
        settle(output);
        settle(weights);
        release(&shared.values_free[value_turn.stage]);
        value_turn.next();
        rescale_and_pack(higher);
    }
    settle(output);
    settle(weights);
    open_products();
    start_output();
    wait_for_products<0>();
    settle(output);
    settle(weights);

    const StateRows after(a, block.work);
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row() + accumulator_row(r);
        total[r] = row_sum(total[r]);
        if (row >= a.n_queries) continue;
        if (lane() % 4 == 0) {
            after.highest[row] = highest[r];
            after.total[row] = total[r];
        }
        float* const output_row = after.output + row * after.token;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = accumulator_column(c);
            if (column < a.v_size) output_row[column] = output[c / 2][2 * r + c % 2];
        }
    }
    if (group == 0) wait_for_turn();  // that was given after the last one: no arrival is left over
}

template <class T, int width>
FIVEDP_KERNEL(hopper_threads, 1)
forward_wgmma(const DeviceAttention a, const Bend<float> bend, const int section,
              const FIVEDP_GRID_CONSTANT TensorMap q, const FIVEDP_GRID_CONSTANT TensorMap k,
              const FIVEDP_GRID_CONSTANT TensorMap v) {
#ifdef FIVEDP_HOPPER
    using Tile = Tiles<width>;
    const int tiles = (a.n_queries + block_rows - 1) / block_rows;
    Block block;
    block.work = work_of(a.batch * a.heads, a.heads, section, tiles, true);
    block.first_query = block.work.tile * block_rows;
    block.kv_head = block.work.head / (a.heads / a.kv_heads);
    KeyWalk<Tile::halves> walk(a, block.work);
    std::uint32_t whole = 0;
    const int first_key = walk.next(whole);
    if (first_key < 0) return;

    if (thread() == 0) {
        Shared<width>& shared = shared_of_block<width>();
        init_barrier(&shared.queries_landed, 1);
        for (int stage = 0; stage < Tile::stages; ++stage) {
            init_barrier(&shared.keys_landed[stage], 1);
            init_barrier(&shared.keys_free[stage], consumer_warps);
            init_barrier(&shared.values_landed[stage], 1);
            init_barrier(&shared.values_checked[stage], checking_warps);
            init_barrier(&shared.values_free[stage], consumer_warps);
        }
        publish_barriers();
    }
    sync_block();
    if (warp() < consumer_warps) {
        raise_registers<consumer_registers>();
        attend<T, width>(a, bend, block, walk, first_key, whole);
    } else {
        lower_registers<copying_registers>();
        if (warp() == consumer_warps)
            bring_tiles<T, width>(block, walk, first_key, q, k, v);
        else
            check_values<T, width>(walk, first_key, whole);
    }
#else
    trap();
#endif
}

template <class T, int width>
bool start(const DeviceAttention& a, Stream stream) {
    using Tile = Tiles<width>;
    BoxedTensor q, k, v;
    if (!boxed(a, a.q, a.n_queries, a.heads, a.size, group_rows, q) ||
        !boxed(a, a.k, a.n_keys, a.kv_heads, a.size, Tile::keys, k) ||
        !boxed(a, a.v, a.n_keys, a.kv_heads, a.v_size, Tile::keys, v) || !built_for_hopper(forward_wgmma<T, width>))
        return false;
    const std::int64_t tiles = (a.n_queries + block_rows - 1) / block_rows;
    const std::int64_t bytes = std::int64_t{2} * a.n_keys * (a.size + a.v_size);
    const int section = heads_of_section(bytes) * (a.heads / a.kv_heads);
    launch(forward_wgmma<T, width>, tiles * a.batch * a.heads, 1, 1, hopper_threads,
           sizeof(Shared<width>) + swizzle_bytes, stream, a, bend_of<float>(a), section, tensor_map(q), tensor_map(k),
           tensor_map(v));
    return true;
}

template <class T>
bool start_padded(const DeviceAttention& a, Stream stream) {
    const int size = a.size > a.v_size ? a.size : a.v_size;
    return size <= 64 ? start<T, 64>(a, stream) : size <= 128 ? start<T, 128>(a, stream) : start<T, 256>(a, stream);
}

}  // namespace

bool attention_forward_sm90(const DeviceAttention& a, Stream stream) {
    if (compute_capability() / 10 != 9) return false;
    return a.type == DeviceType::bf16 ? start_padded<Bf16>(a, stream) : start_padded<Half>(a, stream);
}

}  // namespace fivedp
