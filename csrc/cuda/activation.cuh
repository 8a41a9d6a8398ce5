// The activations of an expert, with CUDA's own exponential and error function: a few units in the last place.
#pragma once

#include "cuda/device.cuh"
#include "cuda/gemm_problem.hpp"

namespace fivedp {

// 1 / (1 + exp(-x)) without overflow.
template <class S>
FIVEDP_DEVICE S logistic(S x) {
    const S small = exp(x < 0 ? x : -x);
    return (x < 0 ? small : S(1)) / (S(1) + small);
}

// NaN stays NaN; x times a factor that has become 0 is 0, for minus infinity as well.
template <class S>
FIVEDP_DEVICE S activate(DeviceActivation activation, S x) {
    if (activation == DeviceActivation::relu) return x <= 0 ? S(0) : x;
    const S bounded = x < S(-1000) ? S(-1000) : x;
    if (activation == DeviceActivation::silu) return bounded * logistic(bounded);
    if (activation == DeviceActivation::gelu) return bounded * (S(0.5) * erfc(bounded * S(-0.70710678118654752440)));
    // (1 + tanh u) / 2 = logistic(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3); powers of more than 100 must not overflow.
    const S y = bounded > S(100) ? S(100) : bounded < S(-100) ? S(-100) : bounded;
    return bounded * logistic(S(1.5957691216057307118) * (y * (S(1) + S(0.044715) * y * y)));
}

}  // namespace fivedp
