// How a product is cut into blocks of C: which way round it is computed, in which order it is summed, how large a block
// is and how much scratch memory one takes. Used for one product (gemm_driver.cpp) and for many (grouped_driver.cpp).
#pragma once

#include "cpu/gemm_problem.hpp"
#include "cpu/sum_plan.hpp"

namespace fivedp {

struct GemmRequest {
    ElementType type;  // of A and B
    std::int64_t m, n;
    const std::int64_t* cuts;  // n_shards + 1 borders of the virtual shards, the first 0 and the last k
    std::int64_t n_shards;
    GemmProblem problem;  // the plan's fields are filled in by the functions below
};

// Below this many multiply-adds waking a second thread costs more than it saves.
constexpr double smallest_parallel_product = 1 << 20;

std::int64_t ceil_div(std::int64_t a, std::int64_t b);
std::int64_t round_up(std::int64_t a, std::int64_t b);

const GemmKernel& gemm_kernel(ElementType type);

// Turns the product into that of the transposed operands where this is faster. The bits are the same.
void choose_orientation(GemmRequest& request, const GemmKernel& kernel);

// Writes the order of the sum into the request; `plan` must outlive it.
void set_sum(GemmRequest& request, const SumPlan& plan);

// Chooses the sizes of a C block; `columns_beside` counts the columns of all products that are streamed in the same
// call.
void plan_blocks(GemmRequest& request, const GemmKernel& kernel, int threads, std::int64_t columns_beside);

// Few rows, and every piece of B contiguous along n.
bool can_stream(const GemmRequest& request, const GemmKernel& kernel);

// Makes the blocks smaller until each has at most so many elements of C, but no smaller than a few tiles.
void limit_blocks(GemmRequest& request, const GemmKernel& kernel, std::int64_t elements);

// Bytes of scratch that a block takes.
std::int64_t block_bytes(const GemmProblem& problem, const GemmKernel& kernel);

// The blocks of C, in the order of memory.
std::int64_t count_blocks(const GemmRequest& request);
BlockRange block_range(const GemmRequest& request, std::int64_t index);

}  // namespace fivedp
