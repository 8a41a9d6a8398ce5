// Work on rows: a block of 256 threads has one long row, or a few warps of it have a shorter one. Rows are read and
// written 16 bytes a thread and access, neighbouring threads beside each other; element by element where they do not
// lie at multiples of 16 bytes, and at their ends. Which thread has which element does not depend on that, so the bits
// of sums do not either.
#pragma once

#include <cstdint>

#include "cuda/block_sum.cuh"
#include "cuda/elements.cuh"

namespace fivedp {

constexpr int row_threads = 256;
constexpr int row_warps = row_threads / 32;

// Some neighbouring elements, loaded and stored at once: as one access where they are 16 bytes or fewer.
template <class T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Elements {
    T at[n];
};
// How many elements a thread has at a time: 16 bytes of them.
template <class T>
constexpr int piece = 16 / static_cast<int>(sizeof(T));

// Elements first <= i < first + n of a row that ends at `end`, zeros from there. `wide`: they lie at a multiple of the
// access.
template <int n, class T>
FIVEDP_DEVICE Elements<T, n> load_elements(const T* row, std::int64_t first, std::int64_t end, bool wide) {
    if (wide && first + n <= end) return *reinterpret_cast<const Elements<T, n>*>(row + first);
    Elements<T, n> values;
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i) values.at[i] = first + i < end ? row[first + i] : T{};
    return values;
}
template <int n, class T>
FIVEDP_DEVICE void store_elements(T* row, std::int64_t first, std::int64_t end, bool wide,
                                  const Elements<T, n>& values) {
    if (wide && first + n <= end) {
        *reinterpret_cast<Elements<T, n>*>(row + first) = values;
        return;
    }
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i)
        if (first + i < end) row[first + i] = values.at[i];
}

// Whether 16-byte accesses are allowed to rows of so many bytes a stride; a null pointer is never accessed.
inline bool lies_wide(const void* data, std::int64_t stride_bytes) {
    return (reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(stride_bytes)) % 16 == 0;
}

// The warps that share a row: few enough that each thread has some pieces of it, all 8 of a block for long rows.
inline int warps_of_a_row(std::int64_t columns, int piece_length) {
    const std::int64_t pieces = (columns + piece_length - 1) / piece_length;
    int warps = 1;
    while (warps < row_warps && pieces > 128 * warps) warps *= 2;
    return warps;
}

// A thread's place: which of its block's rows it works on, its number among the row's threads, how many they are.
struct RowPlace {
    int row, thread, threads;
};
FIVEDP_DEVICE RowPlace row_place(int warps) {
    return {thread() / (32 * warps), thread() % (32 * warps), 32 * warps};
}

// Sums over the threads of each row, in a fixed tree, for all of them; every thread of the block calls it. `room` holds
// n * row_warps values.
template <int n, class S>
FIVEDP_DEVICE void row_sums(S (&values)[n], int warps, S* room) {
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i) values[i] = warp_sum(values[i]);
    if (warps == 1) return;
    const int mine = thread() / 32;
    sync_block();  // the last sums in `room` have been read
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i)
        if (lane() == 0) room[i * row_warps + mine] = values[i];
    sync_block();
    FIVEDP_UNROLL
    for (int i = 0; i < n; ++i)
        values[i] = warp_sum(lane() < warps ? room[i * row_warps + mine / warps * warps + lane()] : S(0));
}

// The largest of a row's values, NaN left out; as `row_sums`.
template <class S>
FIVEDP_DEVICE S row_max(S value, int warps, S* room) {
    const auto of_warp = [](S v) {
        FIVEDP_UNROLL
        for (int half = 16; half > 0; half /= 2) {
            const S other = warp_xor(v, half);
            v = other > v ? other : v;
        }
        return v;
    };
    value = of_warp(value);
    if (warps == 1) return value;
    const int mine = thread() / 32;
    sync_block();
    if (lane() == 0) room[mine] = value;
    sync_block();
    return of_warp(room[mine / warps * warps + lane() % warps]);
}

}  // namespace fivedp
