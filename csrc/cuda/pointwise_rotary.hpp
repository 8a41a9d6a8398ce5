// What the kernel of cuda/pointwise_rotary.cu is asked for, as plain data; the function that starts it.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// y = x with each pair (a, b) of the first `rotated` elements of every head turned by an angle of its token's position:
// (a cos - b sin, a sin + b cos). Pair i is elements 2 i and 2 i + 1 where `interleaved`, else i and i + rotated / 2.
// The angle is that of the tables, or position * base^(-2 i / rotated). y may be x.
struct RotaryProblem {
    DeviceType type;
    bool interleaved, inverse;  // inverse: by the negative angle, which is the backward
    const void* x;
    void* y;
    const void *cosines, *sines;    // (table_rows, rotated / 2), in the type of sums; null: of positions and base
    const std::int64_t* positions;  // null: a token's number in its sequence
    std::int64_t batch, sequence, heads, size, rotated, table_rows;
    std::int64_t positions_stride;            // from one sequence's to the next's; 0: all have the same
    std::int64_t x_strides[3], y_strides[3];  // of batch, sequence and heads, in elements
    double base;
};
void rotary(const RotaryProblem& problem, Stream stream);

}  // namespace fivedp
