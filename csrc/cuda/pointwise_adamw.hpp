// What the kernels of cuda/pointwise_adamw.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// One step of AdamW on n elements, all arrays contiguous. With g = scale * gradient:
// m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
// master = keep * master - step_size * m / (sqrt(v) * root + epsilon); parameter = master, rounded.
struct AdamwProblem {
    DeviceType type, gradient_type;  // of the parameter and of its gradient: the first, or that of sums
    void* parameter;                 // null where the master is the parameter
    void* gradient;
    void *master, *first_moment, *second_moment;  // in the type of sums
    const void* scale;                            // one number in the type of sums, or null: times `factor`
    std::int64_t n;
    bool zero_gradient;
    double factor, beta1, beta2, epsilon;
    double keep;       // 1 - learning rate * weight decay
    double step_size;  // learning rate / (1 - beta1^step)
    double root;       // 1 / sqrt(1 - beta2^step)
};
void adamw(const AdamwProblem& problem, Stream stream);

// total = (add ? total : 0) + sum of x^2, in double; partials: room for squared_norm_partials(n) numbers.
struct SquaredNormProblem {
    DeviceType type;
    const void* x;
    std::int64_t n;
    double *partials, *total;
    bool add;
};
void squared_norm(const SquaredNormProblem& problem, Stream stream);
std::int64_t squared_norm_partials(std::int64_t n);

}  // namespace fivedp
