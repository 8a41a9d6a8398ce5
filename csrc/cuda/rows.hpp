// Matrices of device memory whose rows lie a stride apart, or anywhere: in one of several arrays each.
#pragma once

#include <cstdint>

#include "cuda/device_type.hpp"

namespace fivedp {

// One of the arrays of a table; as three int64, so that Python can write it.
struct RowArray {
    const char* data;
    std::int64_t stride;  // in bytes
    std::int64_t rows;
};

// Row i is data + i * stride; or, where `index` is given, row index[i] of arrays[source[i]] (of arrays[0] where source
// is null). Elements of a row are contiguous. All pointers are to device memory.
struct DeviceRows {
    const char* data;
    std::int64_t stride;  // in bytes
    const RowArray* arrays;
    const std::int32_t *source, *index;
    int n_arrays;
    DeviceType type;
};

}  // namespace fivedp
