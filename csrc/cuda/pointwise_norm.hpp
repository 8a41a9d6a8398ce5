// What the kernels of cuda/pointwise_norm.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// y = (s - mean) * inverse * gain + bias, row by row, with s = x + residual rounded to the arrays' type. LayerNorm
// (`centered`): inverse = 1 / sqrt(variance + epsilon). RMSNorm: the mean counts as 0, so the variance is mean(s^2).
// Elements of a row are contiguous; strides in elements.
struct NormProblem {
    DeviceType type;
    bool centered;
    const void *x, *residual;  // residual: null for none
    const void *gain, *bias;   // null for ones and zeros
    void *sum, *y;             // sum: s, written where there is a residual; it may be x or residual
    void *mean, *inverse;      // (rows,) in the type of sums, for the backward; or null
    std::int64_t rows, columns, x_stride, residual_stride, sum_stride, y_stride;
    double epsilon;
};
void norm_forward(const NormProblem& problem, Stream stream);

// Its gradients. dx is that of s, plus d_sum, which reached s on another way.
struct NormGradientProblem {
    DeviceType type;
    bool centered;
    const void *dy, *sum, *gain, *mean, *inverse;
    const void* d_sum;  // null for none
    void* dx;           // may be dy or d_sum
    void *d_gain, *d_bias;
    bool gradients_of_sums;  // whether d_gain and d_bias are in the type of sums; else in `type`
    void* workspace;         // (n_partials, 1 or 2, width): see norm_partials
    std::int64_t n_partials;
    std::int64_t rows, columns, dy_stride, sum_stride, d_sum_stride, dx_stride;
};
void norm_backward(const NormGradientProblem& problem, Stream stream);

// Blocks that add up gradients of gain and bias, each over rows of its own: a function of the sizes alone, so that the
// bits do not depend on the chip.
std::int64_t norm_partials(DeviceType type, std::int64_t rows, std::int64_t columns);
// Columns of the workspace.
std::int64_t norm_width(DeviceType type, std::int64_t columns);

}  // namespace fivedp
