// What one product is, as plain data: the operands as pieces along k, the borders of the virtual shards, and the plan
// of C blocks. Filled by the bindings and the driver, read by the kernels of every instruction set. No functions here.
#pragma once

#include "common/array_view.hpp"
#include "common/dtype.hpp"

namespace fivedp {

// K blocks of every kernel. Part of the promise on bits: a virtual shard is summed in chains of this many k, counted
// from its start. 256 x 16 floats of B (16 KB) lie in half of the smallest L1 cache. Must be even (bf16 pairs).
constexpr std::int64_t k_block = 256;

constexpr int max_tree_depth = 60;       // open subtrees of 2^60 shards
constexpr int max_chains_per_pass = 16;  // more give nothing, and the plan stays small

// Names of slots: slot i of a block is i, of a strip first_strip_slot - i, of a tile first_tile_slot - i.
constexpr std::int8_t to_c = -1;  // not a slot: the end of the sum
constexpr std::int8_t first_tile_slot = -2;
constexpr std::int8_t first_strip_slot = first_tile_slot - (max_tree_depth + 2);

// One chain of fused multiply-adds from +0 in rising k; then the open sums are added, in this order, and the result is
// stored to a slot or, finished, to C. See cpu/sum_plan.hpp.
struct Chain {
    std::int64_t k_begin, k_end;
    std::int64_t unit_begin, units;  // where it lies in the packed panels of its pass
    int n_open;
    std::int8_t open[max_tree_depth + 2];
    std::int8_t to;
};

// Chains that are packed together.
struct Pass {
    const Chain* chains;
    int n_chains;
    std::int64_t k_begin, k_end, units;
    bool together;  // no chain but the last has a half-filled unit
};

// Passes that go over a strip of A together.
struct Round {
    const Pass* passes;
    int n_passes;
    std::int64_t k_begin, k_end;
};

// One piece of an operand: k_begin <= k < k_end of the whole; `outer` is m for A and n for B. Strides in bytes.
//
// The rows of a piece may also lie anywhere: `rows` then points to one pointer for each, packing gathers them, and
// `data` is not read. One of the strides is the element's size, along the rows; the other, which is not used, is 0,
// and its index, counted from 0 for outer and from k_begin for k, chooses the row. There is no batch then.
struct Piece {
    const char* data;
    std::int64_t k_begin, k_end;
    std::int64_t outer_stride, k_stride, batch_stride;
    const char* const* rows = nullptr;
};

struct Operand {
    const Piece* pieces;
    std::int64_t n_pieces;
};

struct GemmProblem {
    Operand a, b;
    ArrayView c;
    std::int64_t k;
    double alpha, beta;
    // The plan:
    const Round* rounds;
    std::int64_t n_rounds;
    int most_passes;  // of a round
    int n_slots, n_strip_slots, n_tile_slots;
    bool stream;                    // few rows: read B where it lies instead of packing it
    std::int64_t strip_rows;        // rows of A packed at a time, at most
    std::int64_t block_m, block_n;  // sizes of a C block
};

// Asked between pieces of work of well under a millisecond; false stops the product.
struct Poll {
    bool (*call)(void* context);
    void* context;
};

struct BlockRange {
    std::int64_t batch, m_begin, m_end, n_begin, n_end;
};

// One way to multiply one element type on one instruction set.
struct GemmKernel {
    int tile_m, tile_n;
    int unit_k;                     // k in a packed unit: 2 where pairs of bf16 are multiplied, else 1
    std::int64_t unit_size;         // bytes of a packed unit
    std::int64_t pass_units;        // units that a packed row or panel has room for
    std::int64_t accumulator_size;  // bytes of one element of a partial sum
    std::int64_t strip_bytes;       // of A, packed at a time
    int round_passes;               // passes that go over a strip together, at most
    std::int64_t stream_rows;       // products of so few rows stream B
    bool (*block)(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll);
    bool (*stream_block)(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll);
};

struct TreeSumProblem {
    const ArrayView* partials;
    const std::int64_t* leaves;  // virtual shards that each partial sums over
    std::int64_t n_partials;
    ArrayView out;
    double alpha, beta;
};

}  // namespace fivedp
