// A matrix, or a batch of them, as a pointer and byte strides: what the bindings hand to the kernels.
// Strides may be negative, zero or no multiple of the element size; the data need not be aligned.
#pragma once

#include "common/dtype.hpp"

namespace fivedp {

struct ArrayView {
    char* data;
    std::int64_t batch, rows, cols;
    std::int64_t batch_stride, row_stride, col_stride;  // in bytes
    ElementType type;
};

}  // namespace fivedp
