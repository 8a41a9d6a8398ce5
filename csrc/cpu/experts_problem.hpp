// What the expert kernels beside the products work on, as plain data: filled by the bindings, read by the kernels of
// every instruction set. No functions here.
#pragma once

#include "common/array_view.hpp"
#include "common/dtype.hpp"

namespace fivedp {

// Rows of elements that are contiguous along the row: a stride apart, or wherever a table of pointers says.
struct RowsView {
    char* data;
    std::int64_t stride;
    const char* const* table;  // null where `data` and `stride` hold
    ElementType type;
};

enum class Activation : int { silu, gelu, gelu_tanh, relu };

// hidden = activation(gate) * up, or activation(up) where gate.data is null. All of `type`.
struct ActivationProblem {
    Activation activation;
    ElementType type;
    RowsView gate, up, hidden;
    std::int64_t columns;
};

// Its gradient, of d_hidden that is not weighted yet. Absent arrays have null data; `weights` and `d_weights` are in
// the type of sums.
struct ActivationGradientProblem {
    Activation activation;
    ElementType type;  // of all but d_hidden
    RowsView d_hidden, gate, up;
    const char* weights;
    RowsView d_gate, d_up, hidden_weighted;
    char* d_weights;
    std::int64_t columns;
};

// Sums of rows in the fixed tree over expert ids.
struct CombineProblem {
    RowsView rows, out;
    const std::int64_t* starts;
    const char* weights;  // in the type of sums; null for ones
    const std::int32_t* experts;
    std::int64_t n_experts, columns;
    std::uint8_t* joins;  // room for one number a row: how many sums end behind it
};

struct WeightedRowsProblem {
    RowsView rows, out;
    const char* weights;  // in the type of sums
    std::int64_t columns;
};

struct RowDotsProblem {
    RowsView a, b;
    char* out;  // in the type of sums
    std::int64_t columns;
};

// All work on rows row_begin <= row < row_end.
struct ExpertKernels {
    void (*activate)(const ActivationProblem& problem, std::int64_t row_begin, std::int64_t row_end);
    void (*activation_gradient)(const ActivationGradientProblem& problem, std::int64_t row_begin, std::int64_t row_end);
    void (*combine)(const CombineProblem& problem, std::int64_t row_begin, std::int64_t row_end);
    void (*weighted_rows)(const WeightedRowsProblem& problem, std::int64_t row_begin, std::int64_t row_end);
    void (*row_dots)(const RowDotsProblem& problem, std::int64_t row_begin, std::int64_t row_end);
};

}  // namespace fivedp
