// What the kernels of cuda/pointwise_cross_entropy.cu are asked for, as plain data; functions that start them.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// What a row's loss is: with l = log_sum_exp of its logits,
// l - (1 - label_smoothing) * logit of the label - label_smoothing * mean of the logits + z_loss * l^2;
// 0 where the label is `ignored`, NaN where it is no class.
struct CrossEntropyTerms {
    std::int64_t vocabulary;  // classes in all
    std::int64_t ignored;
    double label_smoothing, z_loss;
};

// Of each row of logits, whose columns are the classes first <= class < first + columns: either the loss and the log of
// the sum of exponentials, or, where `partials` is given, what ranks merge: partials is (4, rows) in the type of sums:
// the largest logit, the sum of exp(logit - largest), the label's logit (0 where it is not here), the sum of the
// logits.
struct CrossEntropyProblem {
    DeviceType type;
    const void* logits;
    const std::int64_t* labels;
    void *loss, *log_sum_exp;  // (rows,) in the type of sums; either may be null
    void* partials;
    std::int64_t rows, columns, stride, first;
    CrossEntropyTerms terms;
};
void cross_entropy_forward(const CrossEntropyProblem& problem, Stream stream);

// The same from the partials of all ranks, (n_ranks, 4, rows), merged in their order.
struct CrossEntropyMergeProblem {
    DeviceType sum_type;
    const void* partials;
    const std::int64_t* labels;
    void *loss, *log_sum_exp;
    std::int64_t n_ranks, rows;
    CrossEntropyTerms terms;
};
void cross_entropy_merge(const CrossEntropyMergeProblem& problem, Stream stream);

// d_logits = scale * d_loss * gradient of the loss; it may be logits.
struct CrossEntropyGradientProblem {
    DeviceType type;
    const void* logits;
    const std::int64_t* labels;
    const void *log_sum_exp, *d_loss;  // (rows,) in the type of sums; d_loss: null for ones
    void* d_logits;
    std::int64_t rows, columns, stride, d_stride, first;
    double scale;
    CrossEntropyTerms terms;
};
void cross_entropy_backward(const CrossEntropyGradientProblem& problem, Stream stream);

}  // namespace fivedp
