// Attention on all threads: the work is cut into ranges of queries of one key head.
#pragma once

#include "cpu/attention_problem.hpp"

namespace fivedp {

// Adds the keys to the state of the queries.
void run_attention_forward(const AttentionProblem& problem);

// Adds to d_q, d_k and d_v.
void run_attention_backward(const AttentionProblem& problem);

// The finished output (the type of q, strided) and log_sum (batch, heads, n_queries) of a state.
void finish_attention(const AttentionProblem& problem, const TokenView& output, void* log_sum);

// delta (batch, heads, n_queries): rowsum(d_out * out), in the type of sums.
void attention_delta(const AttentionProblem& problem, const TokenView& output, void* delta);

}  // namespace fivedp
