// The activation that a name from Python stands for.
#pragma once

#include <string>

#include "common/check.hpp"
#include "cuda/device_type.hpp"

namespace fivedp {

// `gated`: whether the call has a gate, as SwiGLU needs and no other activation takes.
inline Activation activation_of(const std::string& name, bool gated, const char* who) {
    check((name == "swiglu") == gated, who, ": activation is ", name, gated ? " with" : " without", " a gate; ",
          gated ? "swiglu" : "gelu, gelu_tanh, relu or silu", " would be right");
    if (name == "swiglu" || name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "relu") return Activation::relu;
    fail(who, ": activation is ", name, "; swiglu, gelu, gelu_tanh, relu or silu would be right");
}

}  // namespace fivedp
