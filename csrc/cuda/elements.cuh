// Element types of device arrays: their bits, and how they become float and back. Sums are float (double for double).
#pragma once

#include <cstdint>

#include "cuda/device.cuh"

namespace fivedp {

struct Bf16 {
    std::uint16_t bits;
};
struct Half {
    std::uint16_t bits;
};

FIVEDP_DEVICE float to_float(float value) {
    return value;
}
FIVEDP_DEVICE double to_float(double value) {
    return value;
}
FIVEDP_DEVICE float to_float(Bf16 value) {
    return bits_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}
FIVEDP_DEVICE float to_float(Half value) {
    return half_bits_as_float(value.bits);
}

// Rounds to nearest, ties to even.
template <class T>
FIVEDP_DEVICE T from_float(float value);
template <>
FIVEDP_DEVICE float from_float<float>(float value) {
    return value;
}
template <>
FIVEDP_DEVICE Bf16 from_float<Bf16>(float value) {
    return {float_as_bf16_bits(value)};
}
template <>
FIVEDP_DEVICE Half from_float<Half>(float value) {
    return {float_as_half_bits(value)};
}
template <class T>
FIVEDP_DEVICE T from_float(double value);
template <>
FIVEDP_DEVICE double from_float<double>(double value) {
    return value;
}

// Two values as one register of a matrix instruction; `low` has the lower address.
template <class T>
FIVEDP_DEVICE std::uint32_t pack_pair(float low, float high);
template <>
FIVEDP_DEVICE std::uint32_t pack_pair<Bf16>(float low, float high) {
    return pack_bf16_pair(low, high);
}
template <>
FIVEDP_DEVICE std::uint32_t pack_pair<Half>(float low, float high) {
    return pack_half_pair(low, high);
}

// The type in which sums over T are kept.
template <class T>
struct SumOf {
    using type = float;
};
template <>
struct SumOf<double> {
    using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

// 16 bytes of elements, loaded and stored at once; the address is a multiple of 16.
template <class T>
struct alignas(16) Vec16 {
    static constexpr int n = 16 / sizeof(T);
    T at[n];
};

}  // namespace fivedp
