// Plans a product, deals its C blocks to the threads and keeps the caller informed.
#pragma once

#include <functional>

#include "cpu/gemm_problem.hpp"

namespace fivedp {

struct GemmRequest {
    ElementType type;  // of A and B
    std::int64_t m, n;
    const std::int64_t* cuts;  // n_shards + 1 borders of the virtual shards, the first 0 and the last k
    std::int64_t n_shards;
    GemmProblem problem;  // the plan's fields are filled in by run_gemm
};

// `progress` is called on the calling thread about every millisecond and returns false to stop the product.
void run_gemm(GemmRequest request, const std::function<bool()>& progress);

void run_tree_sum(const TreeSumProblem& problem);

}  // namespace fivedp
