// What the kernels of all products have in common, those of gemm_tile.cuh and those of gemm_hopper_tile.cuh: where a
// tile lies, how 16 bytes of a factor come to shared memory, flags that are waited for, sums that wait for others of
// the tree, and how results are stored.
#pragma once

#include "cuda/gemm_problem.hpp"
#include "cuda/matrix.cuh"

namespace fivedp {

FIVEDP_HOST_DEVICE std::int64_t least(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

// Where a tile lies in its factors: rows of A from a_first, columns of B from b_first, and how many of each there are.
struct TileOrigin {
    std::int64_t a_first, b_first, k_first = 0;
    int a_count, b_count;
    std::int64_t a_batch = 0, b_batch = 0;
};

// Copies n neighbours of a row of a factor to 16 bytes of shared memory, and zeros for what is missing of them. With
// `vectors` behind the thread's back, for factors whose rows begin at multiples of 16 bytes.
template <class T>
FIVEDP_DEVICE void copy_chunk(char* to, const GemmOperand& from, bool vectors, std::int64_t batch, std::int64_t row,
                              std::int64_t column, int n) {
    const char* begin = from.data;
    if (n > 0) {
        begin = from.rows != nullptr ? reinterpret_cast<const char*>(from.rows[row])
                                     : begin + batch * from.batch_stride + row * from.row_stride;
        begin += column * (vectors ? static_cast<std::int64_t>(sizeof(T)) : from.column_stride);
    }
    if (vectors) {
        copy_async_16(to, begin, n * static_cast<int>(sizeof(T)));
    } else {
        Vec16<T> values;
        FIVEDP_UNROLL
        for (int i = 0; i < Vec16<T>::n; ++i)
            values.at[i] = i < n ? *reinterpret_cast<const T*>(begin + i * from.column_stride) : T{};
        *reinterpret_cast<Vec16<T>*>(to) = values;
    }
}

// Waits until flags first .. last are raised; what was written before they were is then seen by the whole warp.
FIVEDP_DEVICE void wait_for_flags(const int* flags, std::int64_t first, std::int64_t last) {
    if (lane() == 0)
        for (std::int64_t i = first; i <= last; ++i)
            while (load_acquire(flags + i) == 0) {
            }
    warp_sync();
}
// The same, where before() is called by the whole warp first if one of them is not raised yet.
template <class Before>
FIVEDP_DEVICE void wait_for_flags(const int* flags, std::int64_t first, std::int64_t last, const Before& before) {
    std::uint32_t missing = 0;
    if (lane() == 0)
        for (std::int64_t i = first; i <= last && missing == 0; ++i) missing = load_acquire(flags + i) == 0;
    missing = warp_highest(missing);
    warp_sync();
    if (missing == 0) return;
    before();
    wait_for_flags(flags, first, last);
}

// Open sums of a block of threads, each of which finds its own `values` again: what is last put in is first added.
template <class S, int values, int n_threads>
struct OpenSums {
    static constexpr std::int64_t of_tile = std::int64_t{values} * n_threads;
    S* room;
    int n = 0;

    // with(some of the sums, the 16 bytes of room number i that are theirs)
    template <class With>
    FIVEDP_DEVICE void for_vectors(S* sums, int i, const With& with) const {
        constexpr int per = Vec16<S>::n;
        Vec16<S>* const begin = reinterpret_cast<Vec16<S>*>(room + i * of_tile) + thread();
        FIVEDP_UNROLL
        for (int v = 0; v < values / per; ++v) with(sums + v * per, begin[v * n_threads]);
    }
    FIVEDP_DEVICE void add_last_to(S* sums) {
        for_vectors(sums, --n, [](S* value, const Vec16<S>& kept) {
            const Vec16<S> earlier = kept;
            FIVEDP_UNROLL
            for (int i = 0; i < Vec16<S>::n; ++i) value[i] = rounded_sum(earlier.at[i], value[i]);
        });
    }
    FIVEDP_DEVICE void put(S* sums) {
        for_vectors(sums, n++, [](const S* value, Vec16<S>& kept) {
            Vec16<S> vector;
            FIVEDP_UNROLL
            for (int i = 0; i < Vec16<S>::n; ++i) vector.at[i] = value[i];
            kept = vector;
        });
    }
};

// Stores n of some neighbours of a row, at once where they lie so.
template <class T, class S, int most>
FIVEDP_DEVICE void store_neighbours(char* to, std::int64_t column_stride, int n, const S (&values)[most]) {
    struct alignas(most * sizeof(T)) Whole {
        T at[most];
    } whole;
    FIVEDP_UNROLL
    for (int i = 0; i < most; ++i) whole.at[i] = from_float<T>(values[i]);
    if (n == most && column_stride == sizeof(T) && reinterpret_cast<std::uintptr_t>(to) % sizeof(Whole) == 0) {
        *reinterpret_cast<Whole*>(to) = whole;
        return;
    }
    FIVEDP_UNROLL
    for (int i = 0; i < most; ++i)
        if (i < n) *reinterpret_cast<T*>(to + i * column_stride) = whole.at[i];
}

}  // namespace fivedp
