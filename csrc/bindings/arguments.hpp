// What the bindings have in common: element types of NumPy arrays, and a Python callable that is asked during a
// product. bfloat16 arrives as a view of uint16, which no other argument can be.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <exception>
#include <functional>
#include <string>

#include "common/dtype.hpp"

namespace fivedp {

inline const char* name_of(ElementType type) {
    return type == ElementType::f32 ? "float32" : type == ElementType::f64 ? "float64" : "bfloat16";
}

inline std::int64_t size_of(ElementType type) {
    return type == ElementType::f64 ? 8 : type == ElementType::f32 ? 4 : 2;
}

inline bool native_order(const pybind11::array& array) {
    const char order = array.dtype().byteorder();
    return order == '=' || order == '|';
}

inline ElementType type_of(const pybind11::array& array, const char* who, const char* argument) {
    const pybind11::dtype dtype = array.dtype();
    const char kind = dtype.kind();
    const auto size = dtype.itemsize();
    if (native_order(array)) {
        if (kind == 'f' && size == 4) return ElementType::f32;
        if (kind == 'f' && size == 8) return ElementType::f64;
        if (kind == 'u' && size == 2) return ElementType::bf16;
    }
    throw pybind11::type_error(std::string(who) + ": " + argument + " is " + pybind11::str(dtype).cast<std::string>() +
                               "; float32, float64 or bfloat16 in the machine's byte order would be right");
}

// `progress` as the drivers call it, without the interpreter lock; what it raised is passed on by `rethrow`.
class ProgressCall {
  public:
    explicit ProgressCall(const pybind11::object& progress) {
        if (progress.is_none()) return;
        call_ = [this, progress] {
            pybind11::gil_scoped_acquire gil;
            try {
                progress();
                return true;
            } catch (...) {
                raised_ = std::current_exception();
                return false;
            }
        };
    }
    ProgressCall(const ProgressCall&) = delete;
    ProgressCall& operator=(const ProgressCall&) = delete;

    const std::function<bool()>& function() const { return call_; }
    void rethrow() const {
        if (raised_) std::rethrow_exception(raised_);
    }

  private:
    std::function<bool()> call_;
    std::exception_ptr raised_;
};

}  // namespace fivedp
