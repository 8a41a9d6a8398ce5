// Matrices on the GPU whose rows are contiguous: arrays, or the tables that fivedp.kernels.cuda.rows.CudaRows packs.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/device_arrays.hpp"
#include "cuda/rows.hpp"

namespace fivedp {

struct DeviceMatrix {
    DeviceRows view{};
    std::int64_t rows = 0, columns = 0;
    std::uint64_t bits = 0;  // all addresses and strides, or-ed: how far they are aligned
    std::int64_t item = 0;   // bytes of an element

    bool aligned() const { return bits % 16 == 0; }
    char* data() const { return const_cast<char*>(view.data); }
};

inline DeviceMatrix device_matrix(const pybind11::handle& object, bool written, const char* who) {
    const DeviceArray array = device_array(object, who);
    check(array.shape.size() == 2, who, " has shape ", text_of(array.shape), "; (rows, columns) would be right");
    DeviceMatrix matrix;
    matrix.view.type = number_type(array, who);
    matrix.rows = array.shape[0];
    matrix.columns = array.shape[1];
    matrix.item = array.item_size();
    check(matrix.columns <= 1 || matrix.rows == 0 || array.strides[1] == matrix.item, who,
          " is strided along its columns; contiguous rows would be right");
    check(!written || array.writeable, who, " is read-only; a writeable array would be right");
    matrix.view.data = array.data;
    matrix.view.stride = array.strides[0];
    matrix.bits = reinterpret_cast<std::uint64_t>(array.data);
    if (matrix.rows > 1) matrix.bits |= static_cast<std::uint64_t>(matrix.view.stride);
    return matrix;
}

// A contiguous array of whole numbers of one dimension; null for None.
template <class Int>
Int* device_integers(const pybind11::handle& object, std::int64_t n, bool written, const char* who) {
    if (object.is_none()) return nullptr;
    const DeviceArray array = device_array(object, who);
    expect(array, sizeof(Int) == 8 ? "i8" : "i4", {n}, written, who);
    // Of no elements, but given.
    static Int none = 0;
    return array.data != nullptr ? reinterpret_cast<Int*>(array.data) : &none;
}

// `object` is an array, or (arrays, source or None, index, empty array of the type, columns, bits) of CudaRows.
inline DeviceMatrix device_rows(const pybind11::handle& object, const char* who) {
    namespace py = pybind11;
    if (!py::isinstance<py::tuple>(object)) return device_matrix(object, false, who);
    const auto packed = py::reinterpret_borrow<py::tuple>(object);
    check(packed.size() == 6, who, " is a tuple of ", packed.size(), "; CudaRows.packed() would be right");
    const DeviceArray arrays = device_array(packed[0], who), index = device_array(packed[2], who);
    const DeviceArray of_type = device_array(packed[3], who);
    check(arrays.shape.size() == 2 && index.shape.size() == 1, who, ": arrays has shape ", text_of(arrays.shape),
          " and index ", text_of(index.shape), "; (n, 3) and (rows,) would be right");
    expect(arrays, "i8", {arrays.shape[0], 3}, false, who);
    DeviceMatrix matrix;
    matrix.rows = index.shape[0];
    matrix.view.arrays = reinterpret_cast<const RowArray*>(arrays.data);
    matrix.view.n_arrays = static_cast<int>(arrays.shape[0]);
    matrix.view.source = device_integers<std::int32_t>(packed[1], matrix.rows, false, who);
    matrix.view.index = device_integers<std::int32_t>(packed[2], matrix.rows, false, who);
    matrix.view.type = number_type(of_type, who);
    matrix.item = of_type.item_size();
    matrix.columns = packed[4].cast<std::int64_t>();
    matrix.bits = packed[5].cast<std::uint64_t>();
    return matrix;
}

inline void expect_shape(const DeviceMatrix& matrix, std::int64_t rows, std::int64_t columns, const char* who) {
    check(matrix.rows == rows && matrix.columns == columns, who, " has shape (", matrix.rows, ", ", matrix.columns,
          "); (", rows, ", ", columns, ") would be right");
}

inline const char* name_of(DeviceType type) {
    return type == DeviceType::f32    ? "float32"
           : type == DeviceType::f64  ? "float64"
           : type == DeviceType::bf16 ? "bfloat16"
                                      : "float16";
}

}  // namespace fivedp
