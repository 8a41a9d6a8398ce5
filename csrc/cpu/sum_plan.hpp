// The order of a sum over k, as data: which chains of fused multiply-adds there are and how their sums are joined.
//
// A virtual shard is cut into chains of k_block, counted from its start; their sums are added in order. When shard s
// ends, its sum takes up as many open subtrees as s has trailing one bits: a binary counter, so that eight shards are
// added as ((s0+s1)+(s2+s3)) + ((s4+s5)+(s6+s7)). The last shard takes up all that are left, the smallest first. An
// empty shard is one chain of no terms, +0.
//
// Open sums lie in slots. Chains that fit into one packed panel form a pass; some passes that go over a strip of A
// together form a round over a block of C. A sum that a later chain of its own pass takes up is kept beside the tile in
// the L1 cache, one that a later pass of its round takes up in a slot as high as a strip and as wide as a panel, in the
// L2 cache; only the others go to slots of the size of the block.
#pragma once

#include <vector>

#include "cpu/gemm_problem.hpp"

namespace fivedp {

struct SumPlan {
    std::vector<Chain> chains;
    std::vector<Pass> passes;
    std::vector<Round> rounds;
    int most_passes = 0;  // of a round
    int n_slots = 0, n_strip_slots = 0, n_tile_slots = 0;
};

// Borders of the virtual shards of k, unless others are given: those of numpy.array_split(range(k), default_shards).
constexpr std::int64_t default_shards = 8;
void default_cuts(std::int64_t k, std::int64_t* cuts);

// The kernel says how many k a packed unit holds, how many units a pass has room for and how many passes a round.
void plan_sum(const std::int64_t* cuts, std::int64_t n_shards, const GemmKernel& kernel, SumPlan& plan);

}  // namespace fivedp
