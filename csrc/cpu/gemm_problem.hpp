// What one product is, as plain data: the operands as pieces along k, the borders of the virtual shards, and the plan
// of C blocks. Filled by the bindings and the driver, read by the kernels of every instruction set. No functions here.
#pragma once

#include "common/array_view.hpp"
#include "common/dtype.hpp"

namespace fivedp {

// K blocks of every kernel. Part of the promise on bits: a virtual shard is summed in blocks of this many k, counted
// from its start. 256 x 16 floats of B (16 KB) lie in half of the smallest L1 cache. Must be even (bf16 pairs).
constexpr std::int64_t k_block = 256;

constexpr int max_tree_depth = 64;

// One piece of an operand: k_begin <= k < k_end of the whole; `outer` is m for A and n for B. Strides in bytes.
struct Piece {
    const char* data;
    std::int64_t k_begin, k_end;
    std::int64_t outer_stride, k_stride, batch_stride;
};

struct Operand {
    const Piece* pieces;
    std::int64_t n_pieces;
};

struct GemmProblem {
    Operand a, b;
    ArrayView c;
    std::int64_t k;
    const std::int64_t* cuts;  // n_shards + 1 borders, the first 0 and the last k
    std::int64_t n_shards;
    double alpha, beta;
    // The plan:
    int n_slots;                    // tiles of scratch per tile of C: open subtrees and the current shard
    bool stream;                    // few rows: read B where it lies instead of packing it
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
    std::int64_t accumulator_size;  // bytes of one element of a partial sum
    std::int64_t unit_size;         // bytes of one packed unit (a number, or a pair of bf16)
    std::int64_t units_per_block;   // packed units in a K block
    bool (*block)(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll);
};

struct TreeSumProblem {
    const ArrayView* partials;
    const std::int64_t* leaves;  // virtual shards that each partial sums over
    std::int64_t n_partials;
    ArrayView out;
    double alpha, beta;
};

struct KernelTable {
    const char* name;
    GemmKernel f32, f64, bf16;
    // Sums rows row_begin <= row < row_end of the flattened (batch, row) index; the partials' type chooses.
    void (*tree_sum)(const TreeSumProblem& problem, std::int64_t row_begin, std::int64_t row_end);
};

}  // namespace fivedp
