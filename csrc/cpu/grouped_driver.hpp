// Many small products in one call: each group of rows is a product of its own, planned as gemm plans one, and the
// threads take the C blocks of all of them from one counter. So each element has the bits that gemm gives for it.
//
// `progress` is called on the calling thread about every millisecond and returns false to stop. What takes `tiles` may
// be called by several processes for the same job, on operands and results that all of them see: each takes blocks from
// the shared counter, and returns how many there are in all.
#pragma once

#include <functional>

#include "cpu/block_queue.hpp"
#include "cpu/grouped_problem.hpp"

namespace fivedp {

std::int64_t run_grouped_matmul(const GroupedMatmulProblem& problem, const std::function<bool()>& progress,
                                const SharedTiles& tiles);

std::int64_t run_grouped_outer(const GroupedOuterProblem& problem, const std::function<bool()>& progress,
                               const SharedTiles& tiles);

std::int64_t run_expert_hidden(const ExpertHiddenProblem& problem, const std::function<bool()>& progress,
                               const SharedTiles& tiles);

// Row by row, shared among the threads.
std::int64_t run_activation_gradient(const ActivationGradientProblem& problem, std::int64_t rows,
                                     const SharedTiles& tiles);
void run_combine(CombineProblem problem, std::int64_t outputs);
void run_weighted_rows(const WeightedRowsProblem& problem, std::int64_t rows);
void run_row_dots(const RowDotsProblem& problem, std::int64_t rows);
void run_gather_rows(const RowsView& from, const RowsView& to, std::int64_t rows, std::int64_t row_bytes);

}  // namespace fivedp
