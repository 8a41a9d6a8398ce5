// Attention's work on rows: the spans of tiles of tokens, the end of a state, the sum of two states, and delta.
//
// A warp has a row (or a tile of 64 tokens); sums over lanes are in a fixed tree. Each reads what it needs once:
// finishing moves v_size (4 + 2) bytes a row, joining 12 v_size, delta 4 v_size, in 16 bits.
#include "cuda/attention_mask.cuh"
#include "cuda/block_sum.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int row_threads = 128, rows_of_block = row_threads / 32;

FIVEDP_DEVICE int warp_low(int value) {
    FIVEDP_UNROLL
    for (int half = 16; half > 0; half /= 2) {
        const int other = warp_xor(value, half);
        value = other < value ? other : value;
    }
    return value;
}
FIVEDP_DEVICE int warp_high(int value) {
    FIVEDP_UNROLL
    for (int half = 16; half > 0; half /= 2) {
        const int other = warp_xor(value, half);
        value = other > value ? other : value;
    }
    return value;
}

// A warp for each tile of queries, then of keys.
FIVEDP_KERNEL(row_threads, 1)
make_spans(const DeviceAttention a) {
    const int q_tiles = tiles_of(a.n_queries), k_tiles = tiles_of(a.n_keys);
    const int tile = static_cast<int>(block_x()) * rows_of_block + thread() / 32;
    if (tile >= q_tiles + k_tiles) return;
    const bool keys = tile >= q_tiles;
    const int mine = keys ? tile - q_tiles : tile, last = (keys ? a.n_keys : a.n_queries) - 1;
    Place low, high;
    for (int i = 0; i < attention_tile / 32; ++i) {
        const int wanted = mine * attention_tile + 32 * i + lane(), token = wanted < last ? wanted : last;
        const Place place = keys ? key_place(a, token) : query_place(a, token);
        if (i == 0) low = high = place;
        low.position = place.position < low.position ? place.position : low.position;
        high.position = place.position > high.position ? place.position : high.position;
        low.document = place.document < low.document ? place.document : low.document;
        high.document = place.document > high.document ? place.document : high.document;
    }
    const TileSpan span = {warp_low(low.position), warp_high(high.position), warp_low(low.document),
                           warp_high(high.document)};
    if (lane() == 0) (keys ? a.k_spans : a.q_spans)[mine] = span;
}

// Rows in the order of a state's output: batch, query, head.
struct RowPlace {
    int batch, query, head;
    std::int64_t in_memory, by_head;  // of (batch, queries, heads) and of (batch, heads, queries)
};
FIVEDP_DEVICE bool find_row(const AttentionRows& rows, RowPlace& at) {
    const std::int64_t row = block_x() * rows_of_block + thread() / 32;
    if (row >= static_cast<std::int64_t>(rows.batch) * rows.n_queries * rows.heads) return false;
    const std::int64_t token = row / rows.heads;
    at.head = static_cast<int>(row % rows.heads);
    at.query = static_cast<int>(token % rows.n_queries);
    at.batch = static_cast<int>(token / rows.n_queries);
    at.in_memory = row;
    at.by_head = (static_cast<std::int64_t>(at.batch) * rows.heads + at.head) * rows.n_queries + at.query;
    return true;
}
FIVEDP_DEVICE std::int64_t row_offset(const DeviceTokens& tokens, const RowPlace& at) {
    return at.batch * tokens.batch + at.query * tokens.token + at.head * tokens.head;
}

template <class S>
FIVEDP_DEVICE S minus_infinity() {
    return static_cast<S>(bits_as_float(0xff800000u));
}

// out = output / total, and the natural logarithm of the sum of exponentials: 0 and -inf for a row without keys.
template <class T>
FIVEDP_KERNEL(row_threads, 1)
finish_rows(const AttentionRows rows, const AttentionState state, const DeviceTokens out, Sum<T>* log_sum) {
    using S = Sum<T>;
    RowPlace at;
    if (!find_row(rows, at)) return;
    const S highest = static_cast<const S*>(state.highest)[at.by_head];
    const S total = static_cast<const S*>(state.total)[at.by_head];
    const S* const from = static_cast<const S*>(state.output) + at.in_memory * rows.v_size;
    T* const to = static_cast<T*>(const_cast<void*>(out.data)) + row_offset(out, at);
    const bool seen = !(total == 0 && highest == minus_infinity<S>());
    if (lane() == 0)
        log_sum[at.by_head] = seen ? highest * static_cast<S>(natural_log_of_2) + natural_log(total) : highest;
    for (int i = lane(); i < rows.v_size; i += 32) to[i] = from_float<T>(from[i] / (seen ? total : S(1)));
}

// Two states as one; the keys of the first come before those of the second.
template <class S>
FIVEDP_KERNEL(row_threads, 1)
join_rows(const AttentionRows rows, const AttentionState first, const AttentionState second, const AttentionState to) {
    RowPlace at;
    if (!find_row(rows, at)) return;
    const S a = static_cast<const S*>(first.highest)[at.by_head], b = static_cast<const S*>(second.highest)[at.by_head];
    const S top = a > b || b != b ? a : b, from = top == minus_infinity<S>() ? S(0) : top;
    const S of_first = power_of_2(a - from), of_second = power_of_2(b - from);
    const S total = of_first * static_cast<const S*>(first.total)[at.by_head] +
                    of_second * static_cast<const S*>(second.total)[at.by_head];
    warp_sync();  // `to` may be one of the states: all lanes have read what one writes
    if (lane() == 0) {
        static_cast<S*>(to.highest)[at.by_head] = top;
        static_cast<S*>(to.total)[at.by_head] = total;
    }
    for (int i = lane(); i < rows.v_size; i += 32) {
        const std::int64_t element = at.in_memory * rows.v_size + i;
        static_cast<S*>(to.output)[element] = of_first * static_cast<const S*>(first.output)[element] +
                                              of_second * static_cast<const S*>(second.output)[element];
    }
}

// The sum over a row of d_out * out.
template <class T>
FIVEDP_KERNEL(row_threads, 1)
sum_rows(const AttentionRows rows, const DeviceTokens d_out, const DeviceTokens out, Sum<T>* delta) {
    RowPlace at;
    if (!find_row(rows, at)) return;
    const T* const left = static_cast<const T*>(d_out.data) + row_offset(d_out, at);
    const T* const right = static_cast<const T*>(out.data) + row_offset(out, at);
    Sum<T> sum = 0;
    for (int i = lane(); i < rows.v_size; i += 32) sum += to_float(left[i]) * to_float(right[i]);
    sum = warp_sum(sum);
    if (lane() == 0) delta[at.by_head] = sum;
}

std::int64_t blocks_for(const AttentionRows& rows) {
    return (static_cast<std::int64_t>(rows.batch) * rows.n_queries * rows.heads + rows_of_block - 1) / rows_of_block;
}

bool in_16_bits(DeviceType type) {
    return type == DeviceType::bf16 || type == DeviceType::f16;
}

}  // namespace

void attention_spans(const DeviceAttention& a, Stream stream) {
    const int tiles = tiles_of(a.n_queries) + tiles_of(a.n_keys);
    launch(make_spans, (tiles + rows_of_block - 1) / rows_of_block, 1, 1, row_threads, 0, stream, a);
}

void attention_finish(const AttentionRows& rows, const AttentionState& state, const DeviceTokens& out, void* log_sum,
                      Stream stream) {
    with_type(rows.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(finish_rows<T>, blocks_for(rows), 1, 1, row_threads, 0, stream, rows, state, out,
               static_cast<Sum<T>*>(log_sum));
    });
}

void attention_join(const AttentionRows& rows, const AttentionState& first, const AttentionState& second,
                    const AttentionState& to, Stream stream) {
    const auto kernel = rows.type == DeviceType::f64 ? join_rows<double> : join_rows<float>;
    launch(kernel, blocks_for(rows), 1, 1, row_threads, 0, stream, rows, first, second, to);
}

void attention_delta(const AttentionRows& rows, const DeviceTokens& d_out, const DeviceTokens& out, void* delta,
                     Stream stream) {
    with_type(rows.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(sum_rows<T>, blocks_for(rows), 1, 1, row_threads, 0, stream, rows, d_out, out,
               static_cast<Sum<T>*>(delta));
    });
}

const char* attention_forward(const DeviceAttention& a, bool hopper, Stream stream) {
    if (a.batch == 0 || a.n_queries == 0 || a.n_keys == 0) return "none";
    attention_spans(a, stream);
    if (!in_16_bits(a.type)) {
        attention_forward_plain(a, stream);
        return "plain";
    }
    if (hopper && attention_forward_sm90(a, stream)) return "sm90";
    attention_forward_sm80(a, stream);
    return "sm80";
}

const char* attention_backward(const DeviceAttention& a, bool hopper, Stream stream) {
    if (a.batch == 0 || a.n_queries == 0 || a.n_keys == 0) return "none";
    attention_spans(a, stream);
    if (!in_16_bits(a.type)) {
        attention_backward_plain(a, stream);
        return "plain";
    }
    if (hopper && attention_backward_sm90(a, stream)) return "sm90";
    attention_backward_sm80(a, stream);
    return "sm80";
}

}  // namespace fivedp
