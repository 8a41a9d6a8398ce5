// What the routing kernels of cuda/routing*.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// A lane keeps 32 experts of a token in registers, and one slot.
constexpr std::int64_t most_routed_experts = 1024;
constexpr std::int64_t most_slots = 32;

// How a forward call comes to the experts of a token.
enum class DeviceChoice : int {
    by_score,  // the top_k highest are found
    given,     // `chosen` holds them already, -1 for an empty slot
    none       // only scores and sums are wanted: somebody else chooses
};

// Where the whole numbers of a forward call begin, all int64, one after the other: see `routing_numbers`.
enum RoutingNumber : int {
    first_invalid,    // the lowest row with a logit that is not finite, or `no_row`
    first_unknown,    // the lowest row with a given expert that there is not, or `no_row`
    square_whole,     // the sum of log_sum^2: its whole part,
    square_fraction,  // its fractions in units of routing_unit
    square_beyond,    // and how many tokens are left out, their log_sum being beyond 2^20 in size
    first_choice,     // (top_k, experts): how often an expert was chosen in a slot; then (experts): the probabilities
};
constexpr std::int64_t no_row = INT64_MAX;

// Arrays are contiguous and in the type of sums (float64 for float64, else float32) unless it says otherwise. The
// meaning is that of the CPU's RoutingProblem.
struct DeviceRouting {
    DeviceType type;          // of logits
    const void* logits;       // (tokens, experts), the last dimension contiguous
    std::int64_t row_stride;  // in elements
    std::int64_t tokens;
    int experts, top_k;
    bool sigmoid, normalize;
    double scale;
    const void* bias;        // (experts); null: none
    int groups, top_groups;  // 1, 1: no groups
    bool zero_mask;          // experts of the other groups have key 0 instead of being out of reach
    DeviceChoice choice;
    std::int32_t* chosen;  // (tokens, top_k)

    // Forward.
    void *weights, *log_sum, *scores;  // (tokens, top_k), (tokens), (tokens, experts); scores may be null
    std::int64_t* numbers;             // set by the call; see RoutingNumber

    // Backward. A pair whose expert in `kept` (tokens, top_k) is -1 was dropped; `balance` (experts) may be null.
    const std::int32_t* kept;
    const void *d_weights, *balance;
    double z_factor;
    void* d_logits;  // (tokens, experts)
};
void routing_forward(const DeviceRouting& problem, Stream stream);
void routing_backward(const DeviceRouting& problem, Stream stream);

}  // namespace fivedp
