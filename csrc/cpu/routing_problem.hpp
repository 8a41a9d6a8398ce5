// What one call of expert routing on one rank is, as plain data: filled by the bindings, read by the kernels of every
// instruction set. No functions here.
#pragma once

#include "common/dtype.hpp"

namespace fivedp {

// How a forward call comes to the experts of a token.
enum class RoutingChoice : int {
    by_score,  // the top_k highest are found
    given,     // `chosen` holds them already, -1 for an empty slot
    none       // only scores and sums are wanted: somebody else chooses
};

// Arrays are contiguous and in the type of sums (float64 for float64, else float32) unless it says otherwise.
struct RoutingProblem {
    ElementType type;         // of logits
    const char* logits;       // (tokens, experts), the last dimension contiguous
    std::int64_t row_stride;  // in bytes
    std::int64_t tokens, experts, top_k;
    bool sigmoid, normalize;
    double scale;
    const void* bias;                 // (experts); null: none
    std::int64_t groups, top_groups;  // 1, 1: no groups
    bool zero_mask;                   // experts of the other groups have key 0 instead of being out of reach
    RoutingChoice choice;
    std::int32_t* chosen;  // (tokens, top_k)

    // Forward.
    void *weights, *log_sum, *scores;  // (tokens, top_k), (tokens), (tokens, experts); scores may be null

    // Backward. A pair whose expert in `kept` (tokens, top_k) is -1 was dropped. `balance` (experts), which may be
    // null, is the derivative of the balance loss by a token's probabilities, `z_factor` that of the z-loss by half the
    // square of a token's log_sum.
    const std::int32_t* kept;
    const void *d_weights, *balance;
    double z_factor;
    void* d_logits;  // (tokens, experts)
};

// One unit of probability, and of the fraction of a square, in the sums below.
constexpr double routing_unit = 1.0 / 1099511627776.0;  // 2^-40

// Sums over tokens, in whole numbers: any partition of the tokens gives the same.
struct RoutingSums {
    std::int64_t* choices;        // (top_k, experts): how often an expert was chosen in a slot
    std::int64_t* probabilities;  // (experts rounded up to a whole block), in units of routing_unit
    // The sum of log_sum^2: its whole part, and its fractions in units of routing_unit. Tokens whose log_sum is beyond
    // 2^20 in size are counted instead.
    std::int64_t square_whole, square_fraction, beyond;
    std::int64_t
        first_invalid;  // the lowest row with a logit that is not finite, or -1; the rows after it are not done
};

// Elements of the longest vector: what is summed over experts is summed in so many lanes, whatever the instruction set.
template <class T>
constexpr std::int64_t routing_lanes = 64 / sizeof(T);

struct RoutingKernel {
    std::int64_t lanes;
    std::int64_t (*scratch_bytes)(const RoutingProblem& problem);
    // Rows row_begin <= row < row_end; adds to `sums`.
    void (*forward)(const RoutingProblem& problem, std::int64_t row_begin, std::int64_t row_end, RoutingSums& sums,
                    char* scratch);
    void (*backward)(const RoutingProblem& problem, std::int64_t row_begin, std::int64_t row_end, char* scratch);
};

}  // namespace fivedp
