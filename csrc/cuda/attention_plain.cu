// Attention in float32 and float64 with plain multiply-adds: the right answer in full precision, not a fast one.
//
// As the kernels in 16 bits (attention_forward_sm80.cu, attention_backward_sm80.cu), in tiles of 32 rows by 32 tokens
// (16 by 16 in float64): 16 x 16 threads, of which thread (y, x) has rows y + 16 i and columns x + 16 j of every
// product. Tiles lie in shared memory, rows an odd number of elements apart, so that the 16 rows that a half of a warp
// reads lie in different banks; sums are in registers. A product takes a load for each multiply-add, so loads of shared
// memory are what it costs: about an eighth of the chip's rate of multiply-adds.
//
// FLOPs and bytes: as there, of elements of 4 or 8 bytes. Pairs that are masked have weight -1, which products pass
// over: 0 times a NaN that a row does not see would be NaN.
#include "cuda/attention_mask.cuh"

namespace fivedp {
namespace {

constexpr int plain_threads = 256, side = 16;

template <class S>
constexpr int tile_rows = sizeof(S) == 4 ? 32 : 16;
template <class S>
constexpr int per_thread = tile_rows<S> / side;
template <int width>
constexpr int pitch = width + 1;
template <class S>
constexpr int weight_pitch = tile_rows<S> + 1;
template <class S, int width>
constexpr int tile_elements = tile_rows<S>* pitch<width>;
template <class S>
constexpr int weight_elements = tile_rows<S>* weight_pitch<S>;

FIVEDP_DEVICE int thread_y() {
    return thread() / side;
}
FIVEDP_DEVICE int thread_x() {
    return thread() % side;
}

// Rows [first, first + tile_rows) of a head, with zeros after the last token and the last element.
template <class S, int width>
FIVEDP_DEVICE void load_rows(S* to, const DeviceTokens& tokens, int batch, int head, int first, int n_tokens,
                             int size) {
    const S* const from = static_cast<const S*>(tokens.data) + batch * tokens.batch + head * tokens.head;
    for (int i = thread(); i < tile_rows<S> * width; i += plain_threads) {
        const int row = i / width, column = i % width;
        to[row * pitch<width> + column] =
            first + row < n_tokens && column < size ? from[(first + row) * tokens.token + column] : S(0);
    }
}

template <class S>
using Patch = S[per_thread<S>][per_thread<S>];

// The products of this thread's rows of `left` and of `right`, over `size` elements.
template <class S, int width>
FIVEDP_DEVICE void multiply_rows(Patch<S>& sums, const S* left, const S* right, int size) {
    for (int i = 0; i < per_thread<S>; ++i)
        for (int j = 0; j < per_thread<S>; ++j) sums[i][j] = 0;
    for (int k = 0; k < size; ++k) FIVEDP_UNROLL
    for (int i = 0; i < per_thread<S>; ++i) FIVEDP_UNROLL
    for (int j = 0; j < per_thread<S>; ++j)
        sums[i][j] +=
            left[(thread_y() + side * i) * pitch<width> + k] * right[(thread_x() + side * j) * pitch<width> + k];
}

template <class S, int width>
using Rows = S[per_thread<S>][width / side];

// sums += factors right, over the pairs whose weight is not -1.
template <class S, int width>
FIVEDP_DEVICE void multiply_columns(Rows<S, width>& sums, const S* factors, const S* weights, const S* right) {
    for (int k = 0; k < tile_rows<S>; ++k) FIVEDP_UNROLL
    for (int i = 0; i < per_thread<S>; ++i) {
        const int at = (thread_y() + side * i) * weight_pitch<S> + k;
        if (weights[at] == S(-1)) continue;
        const S factor = factors[at];
        FIVEDP_UNROLL
        for (int j = 0; j < width / side; ++j) sums[i][j] += factor * right[k * pitch<width> + thread_x() + side * j];
    }
}

// Sum and maximum over the 16 threads that share rows.
template <class S>
FIVEDP_DEVICE S sum_of_row(S value) {
    FIVEDP_UNROLL
    for (int half = side / 2; half > 0; half /= 2) value += warp_xor(value, half);
    return value;
}
template <class S>
FIVEDP_DEVICE S top_of_row(S value) {
    FIVEDP_UNROLL
    for (int half = side / 2; half > 0; half /= 2) {
        const S other = warp_xor(value, half);
        value = other > value || value != value ? other : value;
    }
    return value;
}

// A query and a key, if both are there and the mask leaves the pair.
FIVEDP_DEVICE bool visible_pair(const DeviceAttention& a, int query, int key) {
    return query < a.n_queries && key < a.n_keys && sees(a, query_place(a, query), key_place(a, key));
}

// A visible logit in units of log(2).
template <class S>
FIVEDP_DEVICE S logit_of(const DeviceAttention& a, const Bend<S>& bend, S slope, S product, int query, int key,
                         S& derivative) {
    derivative = 1;
    if (!bend.bent) return product * bend.factor;
    return bend_logit(bend, product, slope, slope != 0 ? a.q_position[query] - a.k_position[key] : 0, derivative);
}

template <class S, int width>
FIVEDP_KERNEL(plain_threads, 1)
forward_plain(const DeviceAttention a, const Bend<S> bend, const int section) {
    constexpr int rows = tile_rows<S>, n = per_thread<S>, columns = width / side;
    S* const queries = reinterpret_cast<S*>(dynamic_shared());
    S* const tokens = queries + tile_elements<S, width>;  // keys, then values
    S* const weights = tokens + tile_elements<S, width>;

    const int blocks = (a.n_queries + rows - 1) / rows;
    const Work work = work_of(a.batch * a.heads, a.heads, section, blocks, true);
    const int kv_head = work.head / (a.heads / a.kv_heads), first_query = work.tile * rows;
    TileWalk<true> walk(a, first_query / attention_tile, 1);
    bool all;
    int tile = walk.next(all);
    if (tile < 0) return;
    load_rows<S, width>(queries, a.q, work.batch, work.head, first_query, a.n_queries, a.size);

    const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + work.head) * a.n_queries;
    const auto output_row = [&](int query) {
        return static_cast<S*>(a.output) +
               ((static_cast<std::int64_t>(work.batch) * a.n_queries + query) * a.heads + work.head) * a.v_size;
    };
    const S lowest = static_cast<S>(bits_as_float(0xff800000u)), slope = slope_of<S>(a, work.head);
    S highest[n], total[n];
    Rows<S, width> output;
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i) {
        const int query = first_query + thread_y() + side * i;
        const bool there = query < a.n_queries;
        highest[i] = there ? static_cast<const S*>(a.highest)[flat + query] : lowest;
        total[i] = there ? static_cast<const S*>(a.total)[flat + query] : S(0);
        FIVEDP_UNROLL
        for (int j = 0; j < columns; ++j) {
            const int column = thread_x() + side * j;
            output[i][j] = there && column < a.v_size ? output_row(query)[column] : S(0);
        }
    }

    for (; tile >= 0; tile = walk.next(all))
        for (int first_key = tile * attention_tile; first_key < (tile + 1) * attention_tile; first_key += rows) {
            if (first_key >= a.n_keys) break;
            sync_block();  // the last values have been used
            load_rows<S, width>(tokens, a.k, work.batch, kv_head, first_key, a.n_keys, a.size);
            sync_block();
            Patch<S> patch;
            multiply_rows<S, width>(patch, queries, tokens, a.size);
            FIVEDP_UNROLL
            for (int i = 0; i < n; ++i) {
                const int query = first_query + thread_y() + side * i;
                bool seen[n];
                S top = lowest;
                FIVEDP_UNROLL
                for (int j = 0; j < n; ++j) {
                    const int key = first_key + thread_x() + side * j;
                    seen[j] = visible_pair(a, query, key);
                    S derivative;
                    if (seen[j]) patch[i][j] = logit_of(a, bend, slope, patch[i][j], query, key, derivative);
                    if (seen[j] && patch[i][j] > top) top = patch[i][j];
                }
                top = top_of_row(top);
                top = top > highest[i] ? top : highest[i];
                const S from = top == lowest ? S(0) : top;  // -inf - -inf would be NaN
                const S factor = power_of_2(highest[i] - from);
                highest[i] = top;
                S sum = 0;
                FIVEDP_UNROLL
                for (int j = 0; j < n; ++j) {
                    const S weight = seen[j] ? power_of_2(patch[i][j] - from) : S(-1);
                    if (seen[j]) sum += weight;
                    weights[(thread_y() + side * i) * weight_pitch<S> + thread_x() + side * j] = weight;
                }
                total[i] = total[i] * factor + sum_of_row(sum);
                FIVEDP_UNROLL
                for (int j = 0; j < columns; ++j) output[i][j] *= factor;
            }
            sync_block();  // the keys have been used, the weights are there
            load_rows<S, width>(tokens, a.v, work.batch, kv_head, first_key, a.n_keys, a.v_size);
            sync_block();
            multiply_columns<S, width>(output, weights, weights, tokens);
        }

    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i) {
        const int query = first_query + thread_y() + side * i;
        if (query >= a.n_queries) continue;
        if (thread_x() == 0) {
            static_cast<S*>(a.highest)[flat + query] = highest[i];
            static_cast<S*>(a.total)[flat + query] = total[i];
        }
        FIVEDP_UNROLL
        for (int j = 0; j < columns; ++j) {
            const int column = thread_x() + side * j;
            if (column < a.v_size) output_row(query)[column] = output[i][j];
        }
    }
}

// Weights (-1 where masked) and d_logits of a tile, to shared memory; rows are queries or keys.
template <class S, bool keys_in_rows>
FIVEDP_DEVICE void unweigh(const DeviceAttention& a, const Bend<S>& bend, S slope, std::int64_t flat, int first_row,
                           int first_column, const Patch<S>& logits, const Patch<S>& d_weights, S* weights,
                           S* d_logits) {
    for (int i = 0; i < per_thread<S>; ++i)
        for (int j = 0; j < per_thread<S>; ++j) {
            const int y = thread_y() + side * i, x = thread_x() + side * j;
            const int query = keys_in_rows ? first_column + x : first_row + y;
            const int key = keys_in_rows ? first_row + y : first_column + x;
            S weight = -1, d_logit = 0;
            if (visible_pair(a, query, key)) {
                S derivative;
                const S logit = logit_of(a, bend, slope, logits[i][j], query, key, derivative);
                const S sum = static_cast<const S*>(a.log_sum)[flat + query];
                const S delta = static_cast<const S*>(a.delta)[flat + query];
                const bool none = sum == static_cast<S>(bits_as_float(0xff800000u));  // every weight is 0
                weight = none ? S(0) : power_of_2(logit - sum * static_cast<S>(log2_of_e));
                d_logit = weight * (d_weights[i][j] - delta) * derivative;
            }
            weights[y * weight_pitch<S> + x] = weight;
            d_logits[y * weight_pitch<S> + x] = d_logit;
        }
}

// Adds scale * sums to the rows of a gradient (batch, tokens, heads, size).
template <class S, int width>
FIVEDP_DEVICE void add_rows(void* gradient, const Rows<S, width>& sums, S scale, int batch, int n_tokens, int heads,
                            int head, int size, int first) {
    FIVEDP_UNROLL
    for (int i = 0; i < per_thread<S>; ++i) {
        const int token = first + thread_y() + side * i;
        if (token >= n_tokens) continue;
        S* const to =
            static_cast<S*>(gradient) + ((static_cast<std::int64_t>(batch) * n_tokens + token) * heads + head) * size;
        FIVEDP_UNROLL
        for (int j = 0; j < width / side; ++j)
            if (thread_x() + side * j < size) to[thread_x() + side * j] += scale * sums[i][j];
    }
}

template <class S, int width>
FIVEDP_KERNEL(plain_threads, 1)
key_gradients_plain(const DeviceAttention a, const Bend<S> bend, const int section) {
    constexpr int rows = tile_rows<S>;
    S* const keys = reinterpret_cast<S*>(dynamic_shared());
    S* const values = keys + tile_elements<S, width>;
    S* const queries = values + tile_elements<S, width>;
    S* const gradients = queries + tile_elements<S, width>;
    S* const weights = gradients + tile_elements<S, width>;
    S* const d_logits = weights + weight_elements<S>;

    const Work work = work_of(a.batch * a.kv_heads, a.kv_heads, section, (a.n_keys + rows - 1) / rows, false);
    const int group = a.heads / a.kv_heads, first_key = work.tile * rows;
    TileWalk<false> walk(a, first_key / attention_tile, 1);
    load_rows<S, width>(keys, a.k, work.batch, work.head, first_key, a.n_keys, a.size);
    load_rows<S, width>(values, a.v, work.batch, work.head, first_key, a.n_keys, a.v_size);
    Rows<S, width> d_k = {}, d_v = {};
    for (int head = work.head * group; head < (work.head + 1) * group; ++head) {
        const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + head) * a.n_queries;
        walk.restart();
        bool all;
        for (int tile = walk.next(all); tile >= 0; tile = walk.next(all))
            for (int first = tile * attention_tile; first < (tile + 1) * attention_tile; first += rows) {
                if (first >= a.n_queries) break;
                sync_block();  // the last queries have been used
                load_rows<S, width>(queries, a.q, work.batch, head, first, a.n_queries, a.size);
                load_rows<S, width>(gradients, a.d_out, work.batch, head, first, a.n_queries, a.v_size);
                sync_block();
                Patch<S> logits, d_weights;
                multiply_rows<S, width>(logits, keys, queries, a.size);
                multiply_rows<S, width>(d_weights, values, gradients, a.v_size);
                unweigh<S, true>(a, bend, slope_of<S>(a, head), flat, first_key, first, logits, d_weights, weights,
                                 d_logits);
                sync_block();
                multiply_columns<S, width>(d_v, weights, weights, gradients);
                multiply_columns<S, width>(d_k, d_logits, weights, queries);
            }
    }
    add_rows<S, width>(a.d_k, d_k, static_cast<S>(a.scale), work.batch, a.n_keys, a.kv_heads, work.head, a.size,
                       first_key);
    add_rows<S, width>(a.d_v, d_v, S(1), work.batch, a.n_keys, a.kv_heads, work.head, a.v_size, first_key);
}

template <class S, int width>
FIVEDP_KERNEL(plain_threads, 1)
query_gradients_plain(const DeviceAttention a, const Bend<S> bend, const int section) {
    constexpr int rows = tile_rows<S>;
    S* const queries = reinterpret_cast<S*>(dynamic_shared());
    S* const gradients = queries + tile_elements<S, width>;
    S* const keys = gradients + tile_elements<S, width>;
    S* const values = keys + tile_elements<S, width>;
    S* const weights = values + tile_elements<S, width>;
    S* const d_logits = weights + weight_elements<S>;

    const Work work = work_of(a.batch * a.heads, a.heads, section, (a.n_queries + rows - 1) / rows, true);
    const int kv_head = work.head / (a.heads / a.kv_heads), first_query = work.tile * rows;
    const std::int64_t flat = (static_cast<std::int64_t>(work.batch) * a.heads + work.head) * a.n_queries;
    TileWalk<true> walk(a, first_query / attention_tile, 1);
    load_rows<S, width>(queries, a.q, work.batch, work.head, first_query, a.n_queries, a.size);
    load_rows<S, width>(gradients, a.d_out, work.batch, work.head, first_query, a.n_queries, a.v_size);
    Rows<S, width> d_q = {};
    bool all;
    for (int tile = walk.next(all); tile >= 0; tile = walk.next(all))
        for (int first = tile * attention_tile; first < (tile + 1) * attention_tile; first += rows) {
            if (first >= a.n_keys) break;
            sync_block();  // the last keys have been used
            load_rows<S, width>(keys, a.k, work.batch, kv_head, first, a.n_keys, a.size);
            load_rows<S, width>(values, a.v, work.batch, kv_head, first, a.n_keys, a.v_size);
            sync_block();
            Patch<S> logits, d_weights;
            multiply_rows<S, width>(logits, queries, keys, a.size);
            multiply_rows<S, width>(d_weights, gradients, values, a.v_size);
            unweigh<S, false>(a, bend, slope_of<S>(a, work.head), flat, first_query, first, logits, d_weights, weights,
                              d_logits);
            sync_block();
            multiply_columns<S, width>(d_q, d_logits, weights, keys);
        }
    add_rows<S, width>(a.d_q, d_q, static_cast<S>(a.scale), work.batch, a.n_queries, a.heads, work.head, a.size,
                       first_query);
}

template <class S, int width>
void start_forward(const DeviceAttention& a, Stream stream) {
    constexpr int bytes = (2 * tile_elements<S, width> + weight_elements<S>)*static_cast<int>(sizeof(S));
    const std::int64_t row_bytes = static_cast<std::int64_t>(sizeof(S)) * (a.size + a.v_size);
    const std::int64_t blocks = (a.n_queries + tile_rows<S> - 1) / tile_rows<S>;
    launch(forward_plain<S, width>, blocks * a.batch * a.heads, 1, 1, plain_threads, bytes, stream, a, bend_of<S>(a),
           heads_of_section(row_bytes * a.n_keys) * (a.heads / a.kv_heads));
}

template <class S, int width>
void start_backward(const DeviceAttention& a, Stream stream) {
    constexpr int bytes = (4 * tile_elements<S, width> + 2 * weight_elements<S>)*static_cast<int>(sizeof(S));
    const std::int64_t row_bytes = static_cast<std::int64_t>(sizeof(S)) * (a.size + a.v_size);
    const std::int64_t q_blocks = (a.n_queries + tile_rows<S> - 1) / tile_rows<S>;
    const std::int64_t k_blocks = (a.n_keys + tile_rows<S> - 1) / tile_rows<S>;
    const int group = a.heads / a.kv_heads;
    launch(key_gradients_plain<S, width>, k_blocks * a.batch * a.kv_heads, 1, 1, plain_threads, bytes, stream, a,
           bend_of<S>(a), heads_of_section(row_bytes * a.n_queries * group));
    launch(query_gradients_plain<S, width>, q_blocks * a.batch * a.heads, 1, 1, plain_threads, bytes, stream, a,
           bend_of<S>(a), heads_of_section(row_bytes * a.n_keys) * group);
}

}  // namespace

void attention_forward_plain(const DeviceAttention& a, Stream stream) {
    if (a.type == DeviceType::f64)
        start_forward<double, 256>(a, stream);
    else if (a.size <= 64 && a.v_size <= 64)
        start_forward<float, 64>(a, stream);
    else
        start_forward<float, 256>(a, stream);
}

void attention_backward_plain(const DeviceAttention& a, Stream stream) {
    if (a.type == DeviceType::f64)
        start_backward<double, 256>(a, stream);
    else if (a.size <= 64 && a.v_size <= 64)
        start_backward<float, 64>(a, stream);
    else
        start_backward<float, 256>(a, stream);
}

}  // namespace fivedp
