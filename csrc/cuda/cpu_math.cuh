// Exponentials and a logarithm with the bits of the CPU's kernels (csrc/cpu/vec_math.hpp, csrc/cpu/routing.hpp): the
// same polynomials, every operation rounded in the same place.
#pragma once

#include "cuda/elements.cuh"

namespace fivedp {

// 2^x for x <= 0; 0 below the smallest normal number. x = n + f with |f| <= 1/2, and n goes to the exponent.
FIVEDP_DEVICE float cpu_exp2(float x) {
    const float shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
    float sum = 0.00015353362068858489034f;
    sum = fused(sum, f, 0.0013398874393981390061f);
    sum = fused(sum, f, 0.0096184373569574205587f);
    sum = fused(sum, f, 0.055503324708911571697f);
    sum = fused(sum, f, 0.24022647913636852127f);
    sum = fused(sum, f, 0.69314720285503164763f);
    sum = fused(sum, f, 1.0f);
    return x < -126.0f ? 0.0f : bits_as_float(float_as_bits(sum) + (float_as_bits(shifted) << 23));
}
FIVEDP_DEVICE double cpu_exp2(double x) {
    const double shifted = x + 6755399441055744.0, f = x - (shifted - 6755399441055744.0);
    double sum = 4.4347712982003767083e-10;
    sum = fused(sum, f, 7.0737832485031332991e-9);
    sum = fused(sum, f, 1.0178199571842137974e-7);
    sum = fused(sum, f, 1.3215435282308487999e-6);
    sum = fused(sum, f, 1.5252733493127489347e-5);
    sum = fused(sum, f, 0.0001540353045711209086);
    sum = fused(sum, f, 0.0013333558146774620517);
    sum = fused(sum, f, 0.0096181291075941200896);
    sum = fused(sum, f, 0.055504108664820083227);
    sum = fused(sum, f, 0.2402265069591013126);
    sum = fused(sum, f, 0.69314718055994532581);
    sum = fused(sum, f, 1.0);
    return x < -1022.0 ? 0.0 : bits_as_double(double_as_bits(sum) + (double_as_bits(shifted) << 52));
}

// exp(x) for x <= 0.
template <class S>
FIVEDP_DEVICE S cpu_exp(S x) {
    constexpr S high = S(1.4426950408889634074);
    constexpr S low = sizeof(S) == 4 ? S(1.9259629911266175e-8) : S(2.0355273740931033e-17);
    x = x > S(-10000) ? x : S(-10000);
    const S t = rounded_product(x, high), rest = fused(x, low, fused(x, high, -t)), power = cpu_exp2(t);
    return fused(rounded_product(power, rest), S(0.69314718055994530942), power);
}

// log(x) for x >= 1.
FIVEDP_DEVICE double cpu_log(double x) {
    std::uint64_t bits = double_as_bits(x);
    double n = static_cast<double>(static_cast<std::int64_t>(bits >> 52) - 1023);
    double m = bits_as_double((bits & 0xfffffffffffff) | 0x3ff0000000000000);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        n += 1;
    }
    const double s = (m - 1) / (m + 1), square = rounded_product(s, s);
    double sum = 0;  // of square^i / (2 i + 1), i from 1
    FIVEDP_UNROLL
    for (int i = 11; i >= 1; --i) sum = rounded_product(sum + 1.0 / (2 * i + 1), square);
    return rounded_product(n, 0.69314718055994530942) +
           (rounded_product(2.0, s) + rounded_product(rounded_product(2.0, s), sum));
}

}  // namespace fivedp
