// Every kernel of one instruction set.
#pragma once

#include "cpu/attention_problem.hpp"
#include "cpu/copy_problem.hpp"
#include "cpu/experts_problem.hpp"
#include "cpu/gemm_problem.hpp"
#include "cpu/routing_problem.hpp"

namespace fivedp {

struct KernelTable {
    const char* name;
    GemmKernel f32, f64, bf16;
    // Multiplies and adds in registers, so many rounds; returns the operations.
    double (*peak_f32)(std::int64_t), (*peak_f64)(std::int64_t), (*peak_bf16)(std::int64_t);
    // Sums rows row_begin <= row < row_end of the flattened (batch, row) index; the partials' type chooses.
    void (*tree_sum)(const TreeSumProblem& problem, std::int64_t row_begin, std::int64_t row_end);
    void (*copy_rows)(const CopyRows& copy);
    AttentionKernel attention_f32, attention_f64, attention_bf16;
    RoutingKernel routing_f32, routing_f64;  // by the type of sums
    ExpertKernels experts;
};

}  // namespace fivedp
