// Element types of device arrays, activations, and the stream of a call, for code compiled without CUDA's headers.
#pragma once

namespace fivedp {

enum class DeviceType : int { f32, f64, bf16, f16 };

constexpr int element_bytes(DeviceType type) {
    return type == DeviceType::f64 ? 8 : type == DeviceType::f32 ? 4 : 2;
}

// Of an expert. SwiGLU is silu with a gate.
enum class Activation : int { silu, gelu, gelu_tanh, relu };

// A cudaStream_t.
using Stream = void*;

}  // namespace fivedp
