// Attention, backward, in 16 bits, for compute capability 8.0 and later: what some queries and keys owe each other,
// from the log-sum-exp over all keys of all ranks and delta = rowsum(d_out * out).
//
//     weights = 2^(logits - log_sum),   d_logits = weights * (d_out v^T - delta)
//     d_v += weights^T d_out,   d_k += d_logits^T q,   d_q += d_logits k
//
// Two kernels, each with its sums in registers, so that every element is summed in one order and without atomics:
//
//     a block has 64 keys and goes through the tiles of 64 queries of all heads that share them: d_k, d_v.
//         weights^T and d_logits^T are made transposed, keys in rows, and so are left factors as they are
//     a block has 64 queries and goes through the tiles of 64 keys: d_q
//
// Each warp has 16 rows. Shared memory: the two tiles that stay, and those that come, in two buffers up to a head size
// of 128 (97 KB) and one above (128 KB); swizzled as attention_tiles.cuh says. d_k and d_v of sizes above 128 are made
// in four blocks of 64 columns, each of which makes the weights anew.
//
// FLOPs: 2 (4 size + 3 v_size) a visible pair, of which 2 (3 size + 2 v_size) would do for one kernel that adds d_q to
// memory in any order. The gradients are in float and are added to.
#include "cuda/attention_gradients.cuh"
#include "cuda/attention_tiles.cuh"

namespace fivedp {
namespace {

template <int width>
constexpr int stages = width > 128 ? 1 : 2;
// Columns of d_k and d_v that a block makes.
template <int width>
constexpr int key_columns = width > 128 ? 64 : width;
// Of a tile that comes, so many tokens at a time: of 64, the products would take the registers of the sums.
constexpr int part_tokens = 32;
template <int width>
constexpr int tile_bytes = attention_tile* width * 2;
// Two tiles that stay, two that come, and of the latter's queries log_sum and delta.
template <int width>
constexpr int backward_bytes = (2 + 2 * stages<width>)*tile_bytes<width> + stages<width>* attention_tile * 8 + 16;

template <class T, int width>
FIVEDP_KERNEL(attention_threads, width > 128 ? 1 : 2)
key_gradients(const DeviceAttention a, const Bend<float> bend, const int section) {
    constexpr int columns = key_columns<width> / 8, bytes = tile_bytes<width>;
    char* const keys = dynamic_shared();
    char* const values = keys + bytes;
    char* const queries = values + bytes;                     // of both stages
    char* const gradients = queries + stages<width> * bytes;  // likewise
    float* const log_sums = reinterpret_cast<float*>(gradients + stages<width> * bytes);
    float* const deltas = log_sums + stages<width> * attention_tile;
    int* const room = reinterpret_cast<int*>(deltas + stages<width> * attention_tile);

    const Work work = work_of(a.batch * a.kv_heads, a.kv_heads, section, tiles_of(a.n_keys), false);
    const int group = a.heads / a.kv_heads, first_key = work.tile * attention_tile;
    const int first_row = first_key + 16 * warp(), first_chunk = static_cast<int>(block_y()) * columns;
    TileWalk<false> walk(a, work.tile, 1);
    bool all;
    int tile = walk.next(all), head = work.head * group;
    const int heads_end = head + group;
    if (tile < 0) return;

    const auto load_queries = [&](int stage) {
        const int first = tile * attention_tile;
        load_tile<T, width, attention_tile>(queries + stage * bytes, a.q, head_rows<T>(a.q, work.batch, head), first,
                                            a.n_queries, a.size);
        load_tile<T, width, attention_tile>(gradients + stage * bytes, a.d_out, head_rows<T>(a.d_out, work.batch, head),
                                            first, a.n_queries, a.v_size);
        if (thread() < attention_tile) {
            const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + head) * a.n_queries;
            log_sums[stage * attention_tile + thread()] = log_sum_of(a, flat, first + thread());
            deltas[stage * attention_tile + thread()] = delta_of(a, flat, first + thread());
        }
    };
    const auto load_next = [&](int stage) {
        tile = walk.next(all);
        if (tile < 0 && ++head < heads_end) {
            walk.restart();
            tile = walk.next(all);
        }
        if (tile >= 0) load_queries(stage);
        commit_copies();
    };
    load_tile<T, width, attention_tile>(keys, a.k, head_rows<T>(a.k, work.batch, work.head), first_key, a.n_keys,
                                        a.size);
    load_tile<T, width, attention_tile>(values, a.v, head_rows<T>(a.v, work.batch, work.head), first_key, a.n_keys,
                                        a.v_size);
    load_queries(0);
    commit_copies();

    float d_k[1][columns][4] = {}, d_v[1][columns][4] = {};
    for (int stage = 0; head < heads_end; stage = (stage + 1) % stages<width>) {
        const int first_query = tile * attention_tile;
        const bool whole = all;
        const int used_head = head;
        if (stages<width> == 2) load_next(1 - stage);
        wait_for_copies<stages<width> - 1>();
        sync_block();

        FIVEDP_NO_UNROLL
        for (int part = 0; part < attention_tile; part += part_tokens) {
            char* const q = queries + stage * bytes + part * width * 2;
            char* const d_out = gradients + stage * bytes + part * width * 2;
            float logits[1][part_tokens / 8][4], d_weights[1][part_tokens / 8][4];
            multiply_rows<T, width>(logits, keys, 16 * warp(), q);
            multiply_rows<T, width>(d_weights, values, 16 * warp(), d_out);
            const auto of_column = [&](const float* of_tile, int c) {
                return of_tile[stage * attention_tile + part + accumulator_column(c)];
            };
            unweigh<false>(
                a, bend, [&] { return used_head; }, whole, first_row, (first_query + part),
                [&](int, int c) { return of_column(log_sums, c); }, [&](int, int c) { return of_column(deltas, c); },
                logits, d_weights);

            std::uint32_t factors[1][part_tokens / 16][4];
            as_factors<T>(logits, factors);
            if (!whole) sync_block();  // everyone has read the room
            if (!whole && any_nonfinite<T, width, part_tokens>(d_out, room)) {
                add_nonfinite<T, width, part_tokens, false>(a, d_out, (first_query + part), first_row, first_chunk,
                                                            false, d_v);
                clear_nonfinite<T, width, part_tokens>(d_out);
            }
            multiply_columns<T, width>(d_v, factors, d_out, first_chunk);
            as_factors<T>(d_weights, factors);
            if (!whole) {
                sync_block();  // everyone has read the room
                if (any_nonfinite<T, width, part_tokens>(q, room)) {
                    add_nonfinite<T, width, part_tokens, false>(a, q, (first_query + part), first_row, first_chunk,
                                                                true, d_k);
                    clear_nonfinite<T, width, part_tokens>(q);
                }
            }
            multiply_columns<T, width>(d_k, factors, q, first_chunk);
        }
        sync_block();  // the tiles have been used
        if (stages<width> == 1) load_next(0);
    }

    // What the block works on is found again: kept, it would take the registers of sums.
    const Work mine = work_of(a.batch * a.kv_heads, a.kv_heads, computed_here(section), tiles_of(a.n_keys), false);
    const float scale = static_cast<float>(a.scale);
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + accumulator_row(r);
        if (row >= a.n_keys) continue;
        const std::int64_t flat = (static_cast<std::int64_t>(mine.batch) * a.n_keys + row) * a.kv_heads + mine.head;
        float* const to_k = static_cast<float*>(a.d_k) + flat * a.size;
        float* const to_v = static_cast<float*>(a.d_v) + flat * a.v_size;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = 8 * first_chunk + accumulator_column(c);
            if (column < a.size) to_k[column] += scale * d_k[0][c / 2][2 * r + c % 2];
            if (column < a.v_size) to_v[column] += d_v[0][c / 2][2 * r + c % 2];
        }
    }
}

template <class T, int width>
FIVEDP_KERNEL(attention_threads, width > 128 ? 1 : 2)
query_gradients(const DeviceAttention a, const Bend<float> bend, const int section) {
    constexpr int columns = width / 8, bytes = tile_bytes<width>;
    char* const queries = dynamic_shared();
    char* const gradients = queries + bytes;
    char* const keys = gradients + bytes;               // of both stages
    char* const values = keys + stages<width> * bytes;  // likewise
    int* const room = reinterpret_cast<int*>(values + stages<width> * bytes);

    const auto my_work = [&] {
        return work_of(a.batch * a.heads, a.heads, computed_here(section), tiles_of(a.n_queries), true);
    };
    const Work work = my_work();
    const int kv_head = work.head / (a.heads / a.kv_heads), first_query = work.tile * attention_tile;
    const int first_row = first_query + 16 * warp();
    TileWalk<true> walk(a, work.tile, 1);
    bool all;
    int tile = walk.next(all);
    if (tile < 0) return;

    const auto load_keys = [&](int stage) {
        load_tile<T, width, attention_tile>(keys + stage * bytes, a.k, head_rows<T>(a.k, work.batch, kv_head),
                                            tile * attention_tile, a.n_keys, a.size);
        load_tile<T, width, attention_tile>(values + stage * bytes, a.v, head_rows<T>(a.v, work.batch, kv_head),
                                            tile * attention_tile, a.n_keys, a.v_size);
    };
    const auto load_next = [&](int stage) {
        tile = walk.next(all);
        if (tile >= 0) load_keys(stage);
        commit_copies();
    };
    load_tile<T, width, attention_tile>(queries, a.q, head_rows<T>(a.q, work.batch, work.head), first_query,
                                        a.n_queries, a.size);
    load_tile<T, width, attention_tile>(gradients, a.d_out, head_rows<T>(a.d_out, work.batch, work.head), first_query,
                                        a.n_queries, a.v_size);
    load_keys(0);
    commit_copies();

    float log_sum[2], delta[2], d_q[1][columns][4] = {};
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + work.head) * a.n_queries;
        log_sum[r] = log_sum_of(a, flat, first_row + accumulator_row(r));
        delta[r] = delta_of(a, flat, first_row + accumulator_row(r));
    }
    for (int stage = 0; tile >= 0; stage = (stage + 1) % stages<width>) {
        const int first_key = tile * attention_tile;
        const bool whole = all;
        if (stages<width> == 2) load_next(1 - stage);
        wait_for_copies<stages<width> - 1>();
        sync_block();

        FIVEDP_NO_UNROLL
        for (int part = 0; part < attention_tile; part += part_tokens) {
            char* const k = keys + stage * bytes + part * width * 2;
            float logits[1][part_tokens / 8][4], d_weights[1][part_tokens / 8][4];
            multiply_rows<T, width>(logits, queries, 16 * warp(), k);
            multiply_rows<T, width>(d_weights, gradients, 16 * warp(), values + stage * bytes + part * width * 2);
            unweigh<true>(
                a, bend, [&] { return my_work().head; }, whole, first_row, (first_key + part),
                [&](int r, int) { return log_sum[r]; }, [&](int r, int) { return delta[r]; }, logits, d_weights);
            std::uint32_t factors[1][part_tokens / 16][4];
            as_factors<T>(d_weights, factors);
            if (!whole) sync_block();  // everyone has read the room
            if (!whole && any_nonfinite<T, width, part_tokens>(k, room)) {
                add_nonfinite<T, width, part_tokens, true>(a, k, (first_key + part), first_row, 0, true, d_q);
                clear_nonfinite<T, width, part_tokens>(k);
            }
            multiply_columns<T, width>(d_q, factors, k, 0);
        }
        sync_block();  // the tiles have been used
        if (stages<width> == 1) load_next(0);
    }

    // What the block works on is found again: kept, it would take the registers of sums.
    const Work mine = my_work();
    const float scale = static_cast<float>(a.scale);
    FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        const int row = first_row + accumulator_row(r);
        if (row >= a.n_queries) continue;
        const std::int64_t flat = (static_cast<std::int64_t>(mine.batch) * a.n_queries + row) * a.heads + mine.head;
        float* const to = static_cast<float*>(a.d_q) + flat * a.size;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * columns; ++c) {
            const int column = accumulator_column(c);
            if (column < a.size) to[column] += scale * d_q[0][c / 2][2 * r + c % 2];
        }
    }
}

template <class T, int width>
void start(const DeviceAttention& a, Stream stream) {
    const int group = a.heads / a.kv_heads;
    const std::int64_t row_bytes = std::int64_t{2} * (a.size + a.v_size);
    launch(key_gradients<T, width>, static_cast<std::int64_t>(tiles_of(a.n_keys)) * a.batch * a.kv_heads,
           width / key_columns<width>, 1, attention_threads, backward_bytes<width>, stream, a, bend_of<float>(a),
           heads_of_section(row_bytes * a.n_queries * group));
    launch(query_gradients<T, width>, static_cast<std::int64_t>(tiles_of(a.n_queries)) * a.batch * a.heads, 1, 1,
           attention_threads, backward_bytes<width>, stream, a, bend_of<float>(a),
           heads_of_section(row_bytes * a.n_keys) * group);
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

void attention_backward_sm80(const DeviceAttention& a, Stream stream) {
    if (a.type == DeviceType::bf16)
        start_padded<Bf16>(a, stream);
    else
        start_padded<Half>(a, stream);
}

}  // namespace fivedp
