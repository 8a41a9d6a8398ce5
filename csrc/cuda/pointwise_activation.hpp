// What the kernels of cuda/pointwise_activation.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// hidden = silu(gate) * up, or activation(up) where gate is null. Rows of contiguous elements; strides in elements.
struct DeviceActivationProblem {
    DeviceType type;
    Activation activation;
    const void *gate, *up;
    void* hidden;
    std::int64_t rows, columns, gate_stride, up_stride, hidden_stride;
};
void activation_forward(const DeviceActivationProblem& problem, Stream stream);

// Its gradient, of d_hidden that is not weighted yet; see kernels/experts.py. Absent arrays are null. An output may be
// an input of its type.
struct DeviceActivationGradientProblem {
    DeviceType type, d_hidden_type;  // the second: the first, or that of sums
    Activation activation;
    const void *d_hidden, *gate, *up;
    const void* weights;  // (rows,) in the type of sums; null for ones
    void *d_gate, *d_up, *hidden_weighted;
    void* d_weights;  // (rows,) in the type of sums
    std::int64_t rows, columns;
    std::int64_t d_hidden_stride, gate_stride, up_stride, d_gate_stride, d_up_stride, hidden_weighted_stride;
};
void activation_backward(const DeviceActivationGradientProblem& problem, Stream stream);

}  // namespace fivedp
