// Rows of a `DeviceRows` on the device, and elements of them as numbers.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/rows.hpp"

namespace fivedp {

// The row's address; null where the table names none: nobody can check its entries before the kernel runs.
FIVEDP_DEVICE const char* row_of(const DeviceRows& rows, std::int64_t i) {
    if (rows.index == nullptr) return rows.data + i * rows.stride;
    const int source = rows.source != nullptr ? rows.source[i] : 0;
    const std::int64_t index = rows.index[i];
    if (source < 0 || source >= rows.n_arrays) return nullptr;
    const RowArray& array = rows.arrays[source];
    return index >= 0 && index < array.rows ? array.data + index * array.stride : nullptr;
}

// N elements that are loaded or stored together, by accesses of at most 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T at[N];
};

// Stores numbers as elements of `type`, which is double exactly where S is.
template <class S, int N>
FIVEDP_DEVICE void store_as(DeviceType type, char* row, std::int64_t column, const S (&values)[N]) {
    const auto store = [&](auto zero) {
        using T = decltype(zero);
        Pack<T, N> pack;
        FIVEDP_UNROLL
        for (int i = 0; i < N; ++i) pack.at[i] = from_float<T>(values[i]);
        *reinterpret_cast<Pack<T, N>*>(reinterpret_cast<T*>(row) + column) = pack;
    };
    if constexpr (sizeof(S) == 8)
        store(double());
    else if (type == DeviceType::f32)
        store(float());
    else if (type == DeviceType::bf16)
        store(Bf16());
    else
        store(Half());
}

// What a warp of a grid does next: rows in pieces, one after the other. `parts` pieces make a row.
struct WarpItem {
    std::int64_t row, row_step;
    int part, part_step, parts;

    FIVEDP_DEVICE WarpItem(std::int64_t first, std::int64_t n_warps, int pieces)
        : row(first / pieces),
          row_step(n_warps / pieces),
          part(static_cast<int>(first % pieces)),
          part_step(static_cast<int>(n_warps % pieces)),
          parts(pieces) {}
    FIVEDP_DEVICE void next() {
        row += row_step;
        part += part_step;
        if (part >= parts) {
            part -= parts;
            ++row;
        }
    }
};

}  // namespace fivedp
