// The element types of the kernels, as plain data: included by every instruction set's translation unit, so nothing
// here may be an inline function (see cpu/isa_kernels.hpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace fivedp {

enum class ElementType : int { f32, f64, bf16 };

}  // namespace fivedp
