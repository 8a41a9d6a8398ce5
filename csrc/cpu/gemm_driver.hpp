// Plans a product and shares its C blocks among the threads.
#pragma once

#include <functional>

#include "cpu/gemm_plan.hpp"

namespace fivedp {

// `progress` is called on the calling thread about every millisecond and returns false to stop the product.
void run_gemm(GemmRequest request, const std::function<bool()>& progress);

void run_tree_sum(const TreeSumProblem& problem);

}  // namespace fivedp
