// Products of rows grouped by expert, as plain data: filled by the bindings, read by grouped_driver.cpp.
#pragma once

#include <vector>

#include "common/array_view.hpp"
#include "cpu/experts_problem.hpp"

namespace fivedp {

// Columns k_begin <= k < k_end of a matrix of rows; strides in bytes. Where the rows have a table, columns are
// contiguous.
struct RowsPiece {
    RowsView rows;
    std::int64_t k_begin, k_end, column_stride;
};

// k_begin <= k < k_end of the experts' weights (E, K, N).
struct WeightsPiece {
    const char* data;
    std::int64_t k_begin, k_end;
    std::int64_t expert_stride, k_stride, n_stride;
};

// Rows offsets[e] <= row < offsets[e + 1] belong to expert e.
struct Groups {
    const std::int64_t* offsets;
    std::int64_t count;
};

struct GroupedMatmulProblem {
    ElementType type;  // of x and w
    Groups groups;
    std::vector<RowsPiece> x;
    std::vector<WeightsPiece> w;
    std::int64_t k, n;
    ArrayView out;  // (rows, n)
};

struct GroupedOuterProblem {
    ElementType type;
    Groups groups;
    RowsPiece x, dy;
    std::int64_t k, n;
    ArrayView out;  // (experts, k, n)
};

struct ExpertHiddenProblem {
    ElementType type;
    Groups groups;
    RowsPiece x;
    WeightsPiece w_gate, w_up;  // w_gate.data is null without gate
    std::int64_t k, n;
    RowsView gate, up, hidden;  // gate and up have null data where they are not kept
    Activation activation;
};

}  // namespace fivedp
