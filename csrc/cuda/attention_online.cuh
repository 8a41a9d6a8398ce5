// What the kernels of attention forward in 16 bits have in common beside their tiles.
#pragma once

#include "cuda/attention_mask.cuh"

namespace fivedp {

// The state of a head's queries.
struct StateRows {
    float *highest, *total, *output;
    std::int64_t token;  // from one query's output to the next one's

    FIVEDP_DEVICE StateRows(const DeviceAttention& a, const Work& work) {
        const std::int64_t first = static_cast<std::int64_t>(work.batch) * a.heads + work.head;
        highest = static_cast<float*>(a.highest) + first * a.n_queries;
        total = static_cast<float*>(a.total) + first * a.n_queries;
        token = static_cast<std::int64_t>(a.heads) * a.v_size;
        output = static_cast<float*>(a.output) + work.batch * a.n_queries * token + work.head * a.v_size;
    }
};

// Logits of some rows and a tile of keys, brought to units of log(2) where they are bent; -inf where masked.
template <int m, int n>
FIVEDP_DEVICE void finish_logits(const DeviceAttention& a, const Bend<float>& bend, int head, bool all, int first_row,
                                 int first_key, float (&logits)[m][n][4]) {
    if (bend.bent) {
        const float slope = slope_of<float>(a, head);
        FIVEDP_UNROLL
        for (int j = 0; j < n; ++j) FIVEDP_UNROLL
        for (int e = 0; e < 2; ++e) {
            const int key = first_key + accumulator_column(2 * j + e);
            const int k_position = slope != 0 && key < a.n_keys ? a.k_position[key] : 0;
            FIVEDP_UNROLL
            for (int r = 0; r < 2 * m; ++r) {
                const int row = first_row + accumulator_row(r);
                const int apart = slope != 0 && row < a.n_queries ? a.q_position[row] - k_position : 0;
                float& x = logits[r / 2][j][2 * (r % 2) + e];
                float derivative;
                x = bend_logit_fast(bend, x, slope, apart, derivative);
            }
        }
    }
    if (!all) {
        std::uint32_t bits[m];
        visible_bits<true, 2 * n>(a, first_row, first_key, bits);
        const float lowest = bits_as_float(0xff800000u);
        FIVEDP_UNROLL
        for (int r = 0; r < 2 * m; ++r) FIVEDP_UNROLL
        for (int c = 0; c < 2 * n; ++c) {
            float& x = logits[r / 2][c / 2][2 * (r % 2) + c % 2];
            x = visible(bits, r, c) ? x : lowest;
        }
    }
}

}  // namespace fivedp
