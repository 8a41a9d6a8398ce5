// Arrays in device memory, as CuPy shows them (__cuda_array_interface__); the emulation takes NumPy's arrays instead.
// bfloat16 comes as its bits, in uint16.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "cuda/device_type.hpp"

namespace fivedp {

struct DeviceArray {
    char* data = nullptr;
    std::string type;                          // of NumPy's array interface without the byte order: f4, u2, i8
    std::vector<std::int64_t> shape, strides;  // strides in bytes
    bool writeable = false;

    std::int64_t item_size() const { return std::stoll(type.substr(1)); }
    std::int64_t size() const {
        std::int64_t n = 1;
        for (const std::int64_t extent : shape) n *= extent;
        return n;
    }
    bool contiguous() const {
        std::int64_t stride = item_size();
        for (std::size_t d = shape.size(); d-- > 0; stride *= shape[d])
            if (shape[d] > 1 && strides[d] != stride) return size() == 0;
        return true;
    }
};

inline std::string text_of(const std::vector<std::int64_t>& shape) {
    std::string text = "(";
    for (const std::int64_t extent : shape) text += std::to_string(extent) + (shape.size() == 1 ? "," : ", ");
    if (shape.size() > 1) text.resize(text.size() - 2);
    return text + ")";
}

// `who` is the call and the argument, as in "rms_norm: x".
inline DeviceArray device_array(const pybind11::handle& object, const char* who) {
    namespace py = pybind11;
#ifdef FIVEDP_CUDA_EMULATED
    constexpr const char* interface = "__array_interface__";
#else
    constexpr const char* interface = "__cuda_array_interface__";
#endif
    if (!py::hasattr(object, interface)) {
        const std::string name = py::str(py::type::of(object).attr("__name__"));
        throw py::type_error(std::string(who) + " is a " + name + "; an array on the GPU would be right");
    }
    const py::dict about = object.attr(interface);
    DeviceArray array;
    const py::tuple data = about["data"];
    array.data = reinterpret_cast<char*>(data[0].cast<std::uintptr_t>());
    array.writeable = !data[1].cast<bool>();
    const std::string type = about["typestr"].cast<std::string>();
    check(type.size() > 1 && type[0] != '>', who, " has type ", type, "; the machine's byte order would be right");
    array.type = type.substr(1);
    array.shape = about["shape"].cast<std::vector<std::int64_t>>();
    const py::object strides = about.contains("strides") ? py::object(about["strides"]) : py::none();
    if (!strides.is_none()) {
        array.strides = strides.cast<std::vector<std::int64_t>>();
    } else {
        array.strides.assign(array.shape.size(), 0);
        std::int64_t stride = array.item_size();
        for (std::size_t d = array.shape.size(); d-- > 0; stride *= array.shape[d]) array.strides[d] = stride;
    }
    return array;
}

// The element type of an array of numbers.
inline DeviceType number_type(const DeviceArray& array, const char* who) {
    if (array.type == "f4") return DeviceType::f32;
    if (array.type == "f8") return DeviceType::f64;
    if (array.type == "u2") return DeviceType::bf16;
    if (array.type == "f2") return DeviceType::f16;
    throw pybind11::type_error(std::string(who) + " has type " + array.type +
                               "; float32, float64, float16 or bfloat16 would be right");
}

// A stream as Python has it.
inline Stream stream_of(std::uintptr_t number) {
    return reinterpret_cast<Stream>(number);
}

inline const char* sum_type_of(DeviceType type) {
    return type == DeviceType::f64 ? "f8" : "f4";
}

// Checks what most arguments need: type, shape, contiguity; `written` arrays must not be read-only.
inline void expect(const DeviceArray& array, const std::string& type, const std::vector<std::int64_t>& shape,
                   bool written, const char* who) {
    if (array.type != type)
        throw pybind11::type_error(std::string(who) + " has type " + array.type + "; " + type + " would be right");
    check(array.shape == shape, who, " has shape ", text_of(array.shape), "; ", text_of(shape), " would be right");
    check(array.contiguous(), who, " is not contiguous; a contiguous array would be right");
    check(!written || array.writeable, who, " is read-only; a writeable array would be right");
}

// An argument that may be None: then without data.
inline DeviceArray optional_array(const pybind11::handle& object, const char* who) {
    return object.is_none() ? DeviceArray() : device_array(object, who);
}

// Checks the last index to be contiguous, and strides to be whole elements, which they are returned in: strides of
// (rows, columns) and the like, any distance between rows.
inline std::vector<std::int64_t> expect_rows(const DeviceArray& array, const std::string& type,
                                             const std::vector<std::int64_t>& shape, bool written, const char* who) {
    if (array.type != type)
        throw pybind11::type_error(std::string(who) + " has type " + array.type + "; " + type + " would be right");
    check(array.shape == shape, who, " has shape ", text_of(array.shape), "; ", text_of(shape), " would be right");
    check(array.shape.back() <= 1 || array.strides.back() == array.item_size(), who,
          " is not contiguous along its last index; contiguous rows would be right");
    check(!written || array.writeable, who, " is read-only; a writeable array would be right");
    std::vector<std::int64_t> strides;
    for (const std::int64_t stride : array.strides) {
        check(stride % array.item_size() == 0, who, " has a stride of ", stride,
              " bytes; whole elements would be right");
        strides.push_back(stride / array.item_size());
    }
    return strides;
}

}  // namespace fivedp
