// What the kernels of attention backward in 16 bits have in common beside their tiles.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fivedp {

// In units of log(2); a weight 2^(x - inf) is 0: for rows that see no key, and where there is no row.
FIVEDP_DEVICE float log_sum_of(const DeviceAttention& a, std::int64_t first, int query) {
    const float infinity = bits_as_float(0x7f800000u);
    if (query >= a.n_queries) return infinity;
    const float sum = static_cast<const float*>(a.log_sum)[first + query];
    return sum == -infinity ? infinity : sum * static_cast<float>(log2_of_e);
}
FIVEDP_DEVICE float delta_of(const DeviceAttention& a, std::int64_t first, int query) {
    return query < a.n_queries ? static_cast<const float*>(a.delta)[first + query] : 0.0f;
}

// Weights in place of logits, 0 of masked pairs, which `bits` tells (`visible`). Of a query, be it in row r or in
// column c, `log_sum(r, c)`; where logits are bent, `derivative(r, c)` is given what d_logits are multiplied by.
template <bool keys_in_columns, class Head, class LogSum, class Derivative, int n>
FIVEDP_DEVICE void weigh_pairs(const DeviceAttention& a, const Bend<float>& bend, const Head& head, bool all,
                               int first_row, int first_column, const LogSum& log_sum, const Derivative& derivative,
                               float (&logits)[1][n][4], std::uint32_t (&bits)[1]) {
    if (bend.bent) {
        const float slope = slope_of<float>(a, head());
        const int rows = keys_in_columns ? a.n_queries : a.n_keys, columns = keys_in_columns ? a.n_keys : a.n_queries;
        const std::int32_t* const row_position = keys_in_columns ? a.q_position : a.k_position;
        const std::int32_t* const column_position = keys_in_columns ? a.k_position : a.q_position;
        FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) FIVEDP_UNROLL
        for (int r = 0; r < 2; ++r) {
            float& x = logits[0][c / 2][2 * r + c % 2];
            const int row = first_row + accumulator_row(r), column = first_column + accumulator_column(c);
            const bool near = slope != 0 && row < rows && column < columns;
            float steepness;
            x = bend_logit_fast(bend, x, slope, near ? row_position[row] - column_position[column] : 0, steepness);
            derivative(r, c, steepness);
        }
    }
    bits[0] = 0xffffffffu;
    if (!all) visible_bits<keys_in_columns, 2 * n>(a, first_row, first_column, bits);
    FIVEDP_UNROLL
    for (int c = 0; c < 2 * n; ++c) FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        float& x = logits[0][c / 2][2 * r + c % 2];
        x = visible(bits, r, c) ? fast_exp2(fmaf(x, bend.factor, -log_sum(r, c))) : 0.0f;
    }
}

// The same, and d_logits / scale in place of d_out v^T, 0 of masked pairs; `delta(r, c)` of a query.
template <bool keys_in_columns, class Head, class LogSum, class Delta, int n>
FIVEDP_DEVICE void unweigh(const DeviceAttention& a, const Bend<float>& bend, const Head& head, bool all, int first_row,
                           int first_column, const LogSum& log_sum, const Delta& delta, float (&logits)[1][n][4],
                           float (&d_weights)[1][n][4]) {
    FIVEDP_UNROLL
    for (int c = 0; c < 2 * n; ++c) FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) d_weights[0][c / 2][2 * r + c % 2] -= delta(r, c);
    std::uint32_t bits[1];
    weigh_pairs<keys_in_columns>(
        a, bend, head, all, first_row, first_column, log_sum,
        [&](int r, int c, float derivative) { d_weights[0][c / 2][2 * r + c % 2] *= derivative; }, logits, bits);
    FIVEDP_UNROLL
    for (int c = 0; c < 2 * n; ++c) FIVEDP_UNROLL
    for (int r = 0; r < 2; ++r) {
        float& d = d_weights[0][c / 2][2 * r + c % 2];
        d = visible(bits, r, c) ? logits[0][c / 2][2 * r + c % 2] * d : 0.0f;
    }
}

}  // namespace fivedp
