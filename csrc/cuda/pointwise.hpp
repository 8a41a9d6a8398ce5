// What the kernels of cuda/pointwise_*.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// y = x / sqrt(mean(x^2) + epsilon) * gain, row by row; elements of a row are contiguous, strides in elements.
struct RmsNormProblem {
    DeviceType type;
    const void* x;
    const void* gain;  // null: ones
    void* y;
    void* inverse;  // (rows,) in the type of sums: 1 / sqrt(mean(x^2) + epsilon), for the backward; or null
    std::int64_t rows, columns, x_stride, y_stride;
    double epsilon;
};
void rms_norm_forward(const RmsNormProblem& problem, Stream stream);

}  // namespace fivedp
