#pragma once

namespace fivedp {

// A cudaStream_t, for code that is compiled without CUDA's headers.
using Stream = void*;

}  // namespace fivedp
