// What one call of attention on one rank is, as plain data: filled by the bindings, read by the kernels of every
// instruction set. No functions here.
#pragma once

#include "common/dtype.hpp"

namespace fivedp {

// (batch, tokens, heads, size), the last dimension contiguous; strides in bytes.
struct TokenView {
    char* data;
    std::int64_t batch_stride, token_stride, head_stride;
};

// Queries see keys by (document, position): see `visible` in cpu/attention_tiles.hpp. Query head h reads key head
// h / (heads / kv_heads).
struct AttentionProblem {
    ElementType type;  // of q, k, v, d_out
    TokenView q, k, v;
    std::int64_t batch, heads, kv_heads, n_queries, n_keys, size, v_size;
    const std::int32_t *q_position, *k_position;
    const std::int32_t *q_document, *k_document;  // null: all of one document
    double scale;
    bool causal;
    std::int64_t window;   // 0: none
    double softcap;        // 0: none
    const double* slopes;  // of ALiBi, one a query head; null: none

    // What is added after this; null: nothing. Forward: the same queries with other keys; backward: the same keys, with
    // the same gradients, and other queries.
    const AttentionProblem* next;

    // The state between calls, in the type of sums (float64 for float64, else float32), contiguous:
    // highest, total (batch, heads, n_queries): the row's largest logit in units of log(2), and the sum of
    // 2^(logit - highest); output (batch, n_queries, heads, v_size): the values summed with these weights.
    void *highest, *total, *output;

    // Backward only. log_sum (natural) and delta are (batch, heads, n_queries) in the type of sums, d_q, d_k, d_v have
    // the shapes of q, k, v in the type of sums, contiguous, and are added to.
    TokenView d_out;
    const void *log_sum, *delta;
    void *d_q, *d_k, *d_v;
};

// Query rows (queries times the heads that share a key head) that are computed together. Ranges begin at whole tiles.
constexpr std::int64_t query_tile = 64;

// Some queries of the heads that share one key head.
struct AttentionRange {
    std::int64_t batch, kv_head, query_begin, query_end;
};

struct AttentionKernel {
    std::int64_t forward_rows, backward_rows;  // query rows that a range should have at most
    // Bytes of scratch for a range of so many query rows.
    std::int64_t (*forward_bytes)(const AttentionProblem& problem, std::int64_t rows);
    void (*forward)(const AttentionProblem& problem, const AttentionRange& range, char* scratch);
    std::int64_t (*backward_bytes)(const AttentionProblem& problem, std::int64_t rows);
    // Of all queries of the heads that share a key head, `queries` at a time.
    void (*backward)(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head, std::int64_t queries,
                     char* scratch);
};

}  // namespace fivedp
