// What the kernels of cuda/attention_*.cu are asked for, as plain data, and the functions that start them. The meaning
// of all of it is that of csrc/cpu/attention_problem.hpp.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// (batch, tokens, heads, size): the elements of a row are contiguous; strides in elements. `aligned`: every row begins
// at a multiple of 16 bytes.
struct DeviceTokens {
    const void* data;
    std::int64_t batch, token, head;
    bool aligned;
};

// The places of a tile of tokens, from the lowest to the highest.
struct alignas(16) TileSpan {
    std::int32_t position_low, position_high, document_low, document_high;
};

// Tokens of a tile for which one span is made; blocks of a kernel begin at whole ones.
constexpr int attention_tile = 64;

struct DeviceAttention {
    DeviceType type;  // of q, k, v, d_out
    DeviceTokens q, k, v;
    int batch, heads, kv_heads, n_queries, n_keys, size, v_size;
    const std::int32_t *q_position, *k_position, *q_document, *k_document;  // documents null: all of one
    double scale, softcap;                                                  // softcap 0: none
    bool causal;
    int window;            // 0: none
    const double* slopes;  // of ALiBi, one a query head; null: none

    // Workspace of the call: spans of the tiles of queries, then of those of keys.
    TileSpan *q_spans, *k_spans;

    // In the type of sums, contiguous: highest, total (batch, heads, n_queries), output (batch, n_queries, heads,
    // v_size), not normalised.
    void *highest, *total, *output;

    // Backward: log_sum (natural) and delta (batch, heads, n_queries), d_q, d_k, d_v of the shapes of q, k, v, added
    // to; all in the type of sums and contiguous.
    DeviceTokens d_out;
    const void *log_sum, *delta;
    void *d_q, *d_k, *d_v;
};

constexpr int largest_attention_size = 256;
// Of tokens, and of heads of all the batch: indices of tokens and of tiles are int, offsets in memory are not.
constexpr std::int64_t most_attention_tokens = (std::int64_t{1} << 31) - 512;

// Returns which kernel it was: "sm90", "sm80", "plain", or "none" for nothing to do. The first one only where `hopper`
// asks for it, the chip has its instructions and the arrays' rows lie at multiples of 16 bytes.
const char* attention_forward(const DeviceAttention& problem, bool hopper, Stream stream);
const char* attention_backward(const DeviceAttention& problem, bool hopper, Stream stream);

// Rows of a state, or of an output: see the kernels in attention_rows.cu.
struct AttentionRows {
    DeviceType type;  // of out and d_out
    int batch, heads, n_queries, v_size;
};
struct AttentionState {
    void *highest, *total, *output;
};
void attention_finish(const AttentionRows& rows, const AttentionState& state, const DeviceTokens& out, void* log_sum,
                      Stream stream);
void attention_delta(const AttentionRows& rows, const DeviceTokens& d_out, const DeviceTokens& out, void* delta,
                     Stream stream);
// `to` may be one of the others.
void attention_join(const AttentionRows& rows, const AttentionState& first, const AttentionState& second,
                    const AttentionState& to, Stream stream);

// What attention_forward and attention_backward choose from. The spans are made before.
void attention_spans(const DeviceAttention& problem, Stream stream);
void attention_forward_sm80(const DeviceAttention& problem, Stream stream);
// False: not started, because of the chip or of the arrays.
bool attention_forward_sm90(const DeviceAttention& problem, Stream stream);
bool attention_backward_sm90(const DeviceAttention& problem, Stream stream);
void attention_backward_sm80(const DeviceAttention& problem, Stream stream);
void attention_forward_plain(const DeviceAttention& problem, Stream stream);
void attention_backward_plain(const DeviceAttention& problem, Stream stream);

}  // namespace fivedp
