// Plans a product and shares its C blocks among the threads.
#pragma once

#include <functional>

#include "cpu/gemm_plan.hpp"

namespace fivedp {

// `progress` is called on the calling thread about every millisecond and returns false to stop the product.
void run_gemm(GemmRequest request, const std::function<bool()>& progress);

void run_tree_sum(const TreeSumProblem& problem);

// Multiplies and adds in registers on all threads, `rounds` rounds each; returns the operations of all.
double run_multiply_adds(ElementType type, std::int64_t rounds);

}  // namespace fivedp
