// The activations of an expert and their derivatives, element by element: those of csrc/cpu/activations.hpp with the
// GPU's own exponential, to a few units of the last place.
#pragma once

#include <type_traits>

#include "cuda/device_type.hpp"
#include "cuda/elements.cuh"

namespace fivedp {

// exp(x) for -150 <= x <= 0; a result below the smallest normal number counts as 0. What rounding takes off x * log2(e)
// is put back, so that the error does not grow with x.
FIVEDP_DEVICE float exp_of_negative(float x) {
    constexpr float log2_e = 1.4426950408889634f, rest = 1.9259629911266175e-8f, log_2 = 0.69314718055994531f;
    const float scaled = x * log2_e, power = fast_exp2(scaled);
    return fma(power, fma(x, rest, fma(x, log2_e, -scaled)) * log_2, power);
}
FIVEDP_DEVICE double exp_of_negative(double x) {
    return exp(x);
}
FIVEDP_DEVICE double fast_reciprocal(double x) {
    return 1.0 / x;
}

// 1 / (1 + exp(-x)) and 1 / (1 + exp(x)): both without cancellation.
template <class S>
struct Sigmoid {
    S value, rest;
};
template <class S>
FIVEDP_DEVICE Sigmoid<S> sigmoid(S x) {
    // Beyond, the smaller one is 0; infinity would be multiplied by 0. NaN stays NaN.
    constexpr S limit = sizeof(S) == 4 ? S(150) : S(800);
    const S size = x < S(0) ? -x : x, small = exp_of_negative(-(size > limit ? limit : size));
    const S larger_part = fast_reciprocal(S(1) + small), smaller_part = small * larger_part;
    return {x < S(0) ? smaller_part : larger_part, x < S(0) ? larger_part : smaller_part};
}

// An activation and its derivative; what is not used costs nothing.
template <class S>
struct Activated {
    S value, slope;
};
template <Activation activation, class S>
FIVEDP_DEVICE Activated<S> activated(S x) {
    if constexpr (activation == Activation::silu) {
        const Sigmoid<S> s = sigmoid(x);
        return {x * s.value, s.value * fma(x, s.rest, S(1))};
    } else if constexpr (activation == Activation::gelu) {
        // Beyond 40 the density is 0, and the square must not overflow.
        const S y = x > S(40) ? S(40) : x < S(-40) ? S(-40) : x;
        const S exponent = S(-0.5) * y * y, limit = sizeof(S) == 4 ? S(-150) : S(-800);
        const S density = S(0.39894228040143267794) * exp_of_negative(exponent < limit ? limit : exponent);
        const S distribution = normal_distribution(y);
        return {x * distribution, fma(y, density, distribution)};
    } else if constexpr (activation == Activation::gelu_tanh) {
        // (1 + tanh u) / 2 = sigmoid(2 u) with 2 u = 2 sqrt(2 / pi) (x + 0.044715 x^3). Beyond 100 all is saturated,
        // and powers must not overflow.
        constexpr S scale = S(1.5957691216057307118), cubic = S(0.044715);
        const S y = x > S(100) ? S(100) : x < S(-100) ? S(-100) : x, square = y * y;
        const Sigmoid<S> s = sigmoid(scale * y * fma(cubic, square, S(1)));
        const S inner = scale * fma(S(3) * cubic, square, S(1));
        return {x * s.value, s.value * fma(y * s.rest, inner, S(1))};
    } else {
        return {x <= S(0) ? S(0) : x, x <= S(0) ? S(0) : S(1)};
    }
}

// Of n numbers at once. The activation is known at run time only, so that there is one kernel for all; it is chosen
// outside the loop, so that the exponentials of neighbours are under way together.
template <int n, class T, class S>
FIVEDP_DEVICE void activate_all(Activation activation, const T (&x)[n], S (&value)[n], S (&slope)[n]) {
    const auto each = [&](auto chosen) {
        FIVEDP_UNROLL
        for (int e = 0; e < n; ++e) {
            const Activated<S> result = activated<decltype(chosen)::value>(S(to_float(x[e])));
            value[e] = result.value;
            slope[e] = result.slope;
        }
    };
    switch (activation) {
        case Activation::silu:
            return each(std::integral_constant<Activation, Activation::silu>());
        case Activation::gelu:
            return each(std::integral_constant<Activation, Activation::gelu>());
        case Activation::gelu_tanh:
            return each(std::integral_constant<Activation, Activation::gelu_tanh>());
        case Activation::relu:
            return each(std::integral_constant<Activation, Activation::relu>());
    }
}

}  // namespace fivedp
