// Attention, forward, in 16 bits, for compute capability 8.0 and later: adds some keys to the state of some queries.
//
// A block has 128 queries of one head (64 where the head size is above 128) and goes through the tiles of 64 keys that
// the mask leaves something of, from the last to the first:
//
//     logits = q k^T         32 queries a warp (16), in registers
//     weights = 2^(logits - highest), total, output *= factor
//     output += weights v    the weights' accumulators, rounded to pairs, are the left factor
//
// Shared memory: the queries, one tile of keys, one of values (64 KB for 128, two blocks a multiprocessor; 96 KB for
// 256), swizzled as attention_tiles.cuh says. The values come while the logits are computed, the next keys during the
// softmax and the second product. Head sizes are padded to 64, 128 or 256 with zeros that are never loaded.
//
// FLOPs: 2 (size + v_size) a visible pair. Bytes: q once, k and v once for each tile of queries (most of them from L2),
// and the state once; a row that has seen no key yet is not read. The state is not normalised and stays in float, so a
// call takes up where another one stopped and nothing is rounded between them.
//
// The online softmax is that of Milakov and Gimelshein (2018), its blocks those of FlashAttention-2 (Dao, 2023).
#include "cuda/attention_online.cuh"
#include "cuda/attention_tiles.cuh"

namespace fivedp {
namespace {

template <int width>
constexpr int rows_of = width > 128 ? 64 : 128;
template <int width>
constexpr int forward_bytes = (rows_of<width> + 2 * attention_tile) * width * 2 + 16;

template <class T, int width>
FIVEDP_KERNEL(attention_threads, width > 128 ? 1 : 2)
forward_tiles(const DeviceAttention a, const Bend<float> bend, const int section) {
    constexpr int rows = rows_of<width>, m = rows / 64, columns = width / 8;
    char* const queries = dynamic_shared();
    char* const keys = queries + rows * width * 2;
    char* const values = keys + attention_tile * width * 2;
    int* const room = reinterpret_cast<int*>(values + attention_tile * width * 2);

    const int q_tiles = tiles_of(a.n_queries);
    const Work work = work_of(a.batch * a.heads, a.heads, section, (q_tiles + m - 1) / m, true);
    const int first_query = work.tile * rows;
    TileWalk<true> walk(a, work.tile * m, q_tiles - work.tile * m < m ? q_tiles - work.tile * m : m);
    bool all;
    int tile = walk.next(all);
    if (tile < 0) return;

    const int kv_head = work.head / (a.heads / a.kv_heads);
    load_tile<T, width, rows>(queries, a.q, head_rows<T>(a.q, work.batch, work.head), first_query, a.n_queries, a.size);
    load_tile<T, width, attention_tile>(keys, a.k, head_rows<T>(a.k, work.batch, kv_head), tile * attention_tile,
                                        a.n_keys, a.size);
    commit_copies();

    // Found again where it is needed: a kept number would take the register of a sum.
    const auto first_row = [&] { return computed_here(first_query) + warp() * 16 * m; };
    const StateRows before(a, work);
    const float lowest = bits_as_float(0xff800000u);
    float highest[2 * m], total[2 * m], output[m][columns][4];
    FIVEDP_UNROLL
    for (int r = 0; r < 2 * m; ++r) {
        const int row = first_row() + accumulator_row(r);
        highest[r] = row < a.n_queries ? before.highest[row] : lowest;
        total[r] = row < a.n_queries && lane() % 4 == 0 ? before.total[row] : 0.0f;  // this thread's share of a row
        const float* const output_row = before.output + row * before.token;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = accumulator_column(c);
            output[r / 2][c / 2][2 * (r % 2) + c % 2] =
                highest[r] != lowest && column < a.v_size ? output_row[column] : 0.0f;
        }
    }

    while (tile >= 0) {
        const int first_key = tile * attention_tile;
        const bool whole = all;
        wait_for_copies<0>();
        sync_block();  // the keys are there, and the last values have been used
        load_tile<T, width, attention_tile>(values, a.v, head_rows<T>(a.v, computed_here(work.batch), kv_head),
                                            first_key, a.n_keys, a.v_size);
        commit_copies();

        float logits[m][8][4];
        multiply_rows<T, width>(logits, queries, warp() * 16 * m, keys);

        wait_for_copies<0>();
        sync_block();  // the values are there, and the keys have been used
        tile = walk.next(all);
        if (tile >= 0)
            load_tile<T, width, attention_tile>(keys, a.k, head_rows<T>(a.k, computed_here(work.batch), kv_head),
                                                tile * attention_tile, a.n_keys, a.size);
        commit_copies();

        finish_logits(a, bend, work.head, whole, first_row(), first_key, logits);
        FIVEDP_UNROLL
        for (int r = 0; r < 2 * m; ++r) {
            float top = lowest;
            FIVEDP_UNROLL
            for (int c = 0; c < 16; ++c) {
                const float x = logits[r / 2][c / 2][2 * (r % 2) + c % 2];
                top = fmaxf(top, x);  // NaN stays in its weight
            }
            top = fmaxf(top, warp_xor(top, 1));
            top = fmaxf(fmaxf(top, warp_xor(top, 2)) * bend.factor, highest[r]);
            // Rows that have seen nothing yet: -inf - -inf would be NaN.
            const float from = top == lowest ? 0.0f : top;
            if (warp_ballot(!(top == highest[r])) != 0) {
                const float factor = fast_exp2(highest[r] - from);
                highest[r] = top;
                total[r] *= factor;
                FIVEDP_UNROLL
                for (int c = 0; c < 2 * columns; ++c) output[r / 2][c / 2][2 * (r % 2) + c % 2] *= factor;
            }
            FIVEDP_UNROLL
            for (int c = 0; c < 16; ++c) {
                float& x = logits[r / 2][c / 2][2 * (r % 2) + c % 2];
                x = fast_exp2(fmaf(x, bend.factor, -from));
                total[r] += x;
            }
        }
        std::uint32_t weights[m][4][4];
        as_factors<T>(logits, weights);
        if (!whole && any_nonfinite<T, width, attention_tile>(values, room)) {
            add_nonfinite<T, width, attention_tile, true>(a, values, first_key, first_row(), 0, false, output);
            clear_nonfinite<T, width, attention_tile>(values);
        }
        multiply_columns<T, width>(output, weights, values, 0);
    }

    // Where the state is is found again: kept addresses would take the registers of sums.
    const StateRows after(a, work_of(a.batch * a.heads, a.heads, computed_here(section), (q_tiles + m - 1) / m, true));
    FIVEDP_UNROLL
    for (int r = 0; r < 2 * m; ++r) {
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
            if (column < a.v_size) output_row[column] = output[r / 2][c / 2][2 * (r % 2) + c % 2];
        }
    }
}

template <class T, int width>
void start(const DeviceAttention& a, Stream stream) {
    const std::int64_t tiles = (a.n_queries + rows_of<width> - 1) / rows_of<width>;
    const std::int64_t bytes = std::int64_t{2} * a.n_keys * (a.size + a.v_size);
    const int section = heads_of_section(bytes) * (a.heads / a.kv_heads);
    launch(forward_tiles<T, width>, tiles * a.batch * a.heads, 1, 1, attention_threads, forward_bytes<width>, stream, a,
           bend_of<float>(a), section);
}

template <class T>
void start_padded(const DeviceAttention& a, Stream stream) {
    const int size = a.size > a.v_size ? a.size : a.v_size;
    if (size <= 64)
        start<T, 64>(a, stream);
    else if (size <= 128)
        start<T, 128>(a, stream);
    else
        start<T, 256>(a, stream);
}

}  // namespace

void attention_forward_sm80(const DeviceAttention& a, Stream stream) {
    if (a.type == DeviceType::bf16)
        start_padded<Bf16>(a, stream);
    else
        start_padded<Half>(a, stream);
}

}  // namespace fivedp
