// What the kernels of cuda/expert_rows.cu and cuda/combine_rows.cu are asked for, as plain data; functions that start
// them. The meanings are those of the CPU's kernels (csrc/cpu/experts_problem.hpp). `aligned` says that every row of
// every matrix begins at a multiple of 16 bytes.
#pragma once

#include "cuda/rows.hpp"

namespace fivedp {

struct DeviceGather {
    DeviceRows from;
    char* out;
    std::int64_t out_stride, rows, row_bytes;  // in bytes
    int word;                                  // 16, 4 or 2: bytes of which all addresses are multiples
};
// A row that the table does not name is left as it is.
void gather_rows(const DeviceGather& problem, Stream stream);

struct DeviceWeightedRows {
    DeviceRows rows;
    const void* weights;  // in the type of sums
    char* out;
    std::int64_t out_stride;  // in bytes
    DeviceType out_type;
    std::int64_t n_rows, columns;
    bool aligned;
};
// The same of a row that is not named.
void weighted_rows(const DeviceWeightedRows& problem, Stream stream);

struct DeviceRowDots {
    DeviceRows a, b;
    void* out;  // in the type of sums
    std::int64_t n_rows, columns;
};
// 0 where a row is not named.
void row_dots(const DeviceRowDots& problem, Stream stream);

struct DeviceCombine {
    DeviceRows rows;
    const std::int64_t* starts;
    const void* weights;  // in the type of sums; null for ones
    const std::int32_t* experts;
    int n_experts;
    char* out;
    std::int64_t out_stride;  // in bytes
    DeviceType out_type;
    std::int64_t outputs, columns;
    bool aligned;
    std::int64_t most;  // rows that most outputs have, at most: others are slower
};
constexpr int most_combined_experts = 1 << 16;
// A row that is not named counts as zeros.
void combine_rows(const DeviceCombine& problem, Stream stream);

}  // namespace fivedp
