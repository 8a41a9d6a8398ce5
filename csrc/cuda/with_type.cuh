// From an element type known at run time to a template's argument.
#pragma once

#include "cuda/device_type.hpp"
#include "cuda/elements.cuh"

namespace fivedp {

template <class T>
struct TypeTag {
    using type = T;
};

// Calls with(TypeTag<T>()).
template <class With>
void with_type(DeviceType type, const With& with) {
    switch (type) {
        case DeviceType::f32:
            return with(TypeTag<float>());
        case DeviceType::f64:
            return with(TypeTag<double>());
        case DeviceType::bf16:
            return with(TypeTag<Bf16>());
        case DeviceType::f16:
            return with(TypeTag<Half>());
    }
}

}  // namespace fivedp
