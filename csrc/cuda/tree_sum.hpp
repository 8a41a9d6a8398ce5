// What the kernel of cuda/tree_sum.cu is asked for, as plain data; the function that starts it.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// An array (batch, rows, columns) anywhere in device memory; strides in elements.
struct DeviceMatrix {
    char* data;
    std::int64_t batch_stride, row_stride, column_stride;
};

constexpr int max_partials = 64;

// out = alpha * (sum of the partials in the tree over virtual shards) + beta * out.
struct DeviceTreeSumProblem {
    DeviceType type, out_type;  // of the partials and of out; sums are of `type`, float32 or float64
    int n_partials;
    DeviceMatrix partials[max_partials];
    std::uint8_t joins[max_partials];  // how many open sums the partial joins when it has come
    int depth;                         // the most sums open at a time
    DeviceMatrix out;
    std::int64_t batch, rows, columns;
    double alpha, beta;
};
void tree_sum(const DeviceTreeSumProblem& problem, Stream stream);

}  // namespace fivedp
