// What a kernel is told of a box that is copied.
#pragma once

#include <cstdint>

namespace fivedp {

// `rows` rows of `bytes` bytes each; strides in bytes.
struct CopyRows {
    char* to;
    const char* from;
    std::int64_t rows, bytes, to_stride, from_stride;
    bool stream;  // past the caches
};

}  // namespace fivedp
