// The order of a sum over k, as data: which chains of fused multiply-adds there are and how their sums are joined.
//
// A virtual shard is cut into chains of k_block, counted from its start; their sums are added in order. When shard s
// ends, its sum takes up as many open subtrees as s has trailing one bits: a binary counter, so that eight shards are
// added as ((s0+s1)+(s2+s3)) + ((s4+s5)+(s6+s7)). The last shard takes up all that are left, the smallest first. An
// empty shard is one chain of no terms, +0.
//
// Open sums lie in slots. Chains that fit into one packed panel together form a pass over a block of C; a sum that a
// later chain of its own pass takes up is kept beside the tile in the L1 cache (a local slot) and never reaches memory.
#pragma once

#include <vector>

#include "cpu/gemm_problem.hpp"

namespace fivedp {

struct SumPlan {
    std::vector<Chain> chains;
    std::vector<Pass> passes;
    int n_slots = 0;        // slots in scratch
    int n_local_slots = 0;  // slots beside the tile
};

// Borders of the virtual shards of k, unless others are given: those of numpy.array_split(range(k), default_shards).
constexpr std::int64_t default_shards = 8;
void default_cuts(std::int64_t k, std::int64_t* cuts);

// `unit_k` is how many k a packed unit holds, `pass_units` how many units a packed panel has room for.
void plan_sum(const std::int64_t* cuts, std::int64_t n_shards, int unit_k, std::int64_t pass_units, SumPlan& plan);

}  // namespace fivedp
