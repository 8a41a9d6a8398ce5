// Routing on all threads: every thread takes some rows at a time and keeps its own sums, in whole numbers.
#pragma once

#include "cpu/routing_problem.hpp"

namespace fivedp {

// What a forward call says of its tokens beyond the arrays in the problem.
struct RoutingTotals {
    std::int64_t square_whole, square_fraction, beyond;  // as in RoutingSums
    std::int64_t first_invalid;                          // the lowest row with a logit that is not finite, or -1
};

// `choices` (top_k, experts) and `probabilities` (experts) are written. Where a row is invalid nothing written is of
// use.
RoutingTotals run_routing_forward(const RoutingProblem& problem, std::int64_t* choices, std::int64_t* probabilities);

void run_routing_backward(const RoutingProblem& problem);

// Dropping by position: `kept` (tokens, top_k) is `chosen`, or -1 where an expert has had `capacity` tokens before.
// `before` (top_k, experts) says how many pairs of the same slot and expert come before this rank's first one, those of
// lower slots of all tokens included; it is counted up.
void drop_by_position(const std::int32_t* chosen, std::int64_t tokens, std::int64_t top_k, std::int64_t experts,
                      std::int64_t capacity, std::int64_t* before, std::int32_t* kept);

}  // namespace fivedp
