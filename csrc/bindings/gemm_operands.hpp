// Device arrays as the factors and results of products.
#pragma once

#include <string>

#include "bindings/device_arrays.hpp"
#include "cuda/gemm_problem.hpp"

namespace fivedp {

// (outer, k), or (batch, outer, k), of an array whose last two indices are these, or k and outer.
struct FactorArray {
    DeviceArray array;
    bool batched;
    int outer_index, k_index;

    std::int64_t batch() const { return batched ? array.shape[0] : 1; }
    std::int64_t outer() const { return array.shape[static_cast<std::size_t>(outer_index)]; }
    std::int64_t k() const { return array.shape[static_cast<std::size_t>(k_index)]; }
    std::int64_t outer_stride() const { return array.strides[static_cast<std::size_t>(outer_index)]; }
    std::int64_t k_stride() const { return array.strides[static_cast<std::size_t>(k_index)]; }
};

inline FactorArray factor_array(const pybind11::handle& object, bool k_first, const char* who) {
    FactorArray factor;
    factor.array = device_array(object, who);
    const int n = static_cast<int>(factor.array.shape.size());
    check(n == 2 || n == 3, who, " has ", n, " dimensions; 2, or 3 with a batch, would be right");
    factor.batched = n == 3;
    factor.outer_index = k_first ? n - 1 : n - 2;
    factor.k_index = k_first ? n - 2 : n - 1;
    return factor;
}

// The factor from its k-th element along k on, the way round in which rows can be copied 16 bytes at a time, if any.
// `along_k`: 0 or 1 for a way that is given, -1 for a free choice.
inline GemmOperand operand_of(const FactorArray& factor, std::int64_t k, int along_k = -1) {
    const std::int64_t item = factor.array.item_size(), batch = factor.batch();
    const std::int64_t batch_stride = factor.batched && batch > 1 ? factor.array.strides[0] : 0;
    const char* const data = factor.array.data + k * factor.k_stride();
    const auto oriented = [&](bool rows_along_k) {
        const std::int64_t rows = rows_along_k ? factor.k() : factor.outer();
        const std::int64_t columns = rows_along_k ? factor.outer() : factor.k();
        GemmOperand operand{};
        operand.data = data;
        operand.row_stride = rows_along_k ? factor.k_stride() : factor.outer_stride();
        operand.column_stride = rows_along_k ? factor.outer_stride() : factor.k_stride();
        operand.batch_stride = batch_stride;
        operand.k_before = k;
        operand.rows_along_k = rows_along_k;
        operand.vectors = (columns <= 1 || operand.column_stride == item) &&
                          reinterpret_cast<std::uintptr_t>(data) % 16 == 0 &&
                          (rows <= 1 || operand.row_stride % 16 == 0) && batch_stride % 16 == 0;
        return operand;
    };
    if (along_k >= 0) return oriented(along_k != 0);
    const GemmOperand first = oriented(false);
    if (first.vectors) return first;
    const GemmOperand second = oriented(true);
    return second.vectors ? second : first;
}

// A result of (rows, columns), or (batch, rows, columns) where batch is not -1; of the factors' type or, with `sums`,
// that of sums.
inline GemmResult result_of(const pybind11::handle& object, DeviceType type, const std::string& type_name,
                            std::int64_t batch, std::int64_t rows, std::int64_t columns, bool sums, const char* who) {
    const DeviceArray array = device_array(object, who);
    const std::string sum_name = sum_type_of(type);
    if (array.type != type_name && !(sums && array.type == sum_name))
        throw pybind11::type_error(std::string(who) + " has type " + array.type + "; " + type_name +
                                   (sums && sum_name != type_name ? " or " + sum_name : "") + " would be right");
    std::vector<std::int64_t> shape{rows, columns};
    if (batch >= 0) shape.insert(shape.begin(), batch);
    check(array.shape == shape, who, " has shape ", text_of(array.shape), "; ", text_of(shape), " would be right");
    check(array.writeable, who, " is read-only; a writeable array would be right");
    const std::size_t n = shape.size();
    return {array.data, array.strides[n - 2], array.strides[n - 1], n == 3 && batch > 1 ? array.strides[0] : 0,
            array.type != type_name};
}

}  // namespace fivedp
