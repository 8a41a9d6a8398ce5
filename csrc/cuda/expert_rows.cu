// Rows of experts on their way: copied from wherever they lie, weighted, and multiplied row by row.
//
// A warp has a piece of a row: 4 loads of 16 bytes a lane (2 KiB a warp) are under way before the first is used. Blocks
// of 8 warps, 6 or more on a multiprocessor, go through the pieces with the stride of the grid, neighbouring warps on
// neighbouring memory; where the next piece lies is looked up while this one travels. In flight on a multiprocessor:
// 48 warps of 2 KiB, three times what an H200 needs (4.8 TB/s times about 0.8 us is 29 KiB). No shared memory.
//
// Bytes: each row read once and written once, and 8 bytes for its name; an array whose rows are taken k times comes
// from the L2 cache where it fits, so stores are marked as the first to leave it. T = 4096, k = 2, H = 4096 in
// bfloat16: 67 MB written and 34 to 67 MB read, 21 to 28 us at 4.8 TB/s; at 85 % of what a copy reaches (about 4.2
// TB/s), 28 to 38 us.
#include "cuda/block_sum.cuh"
#include "cuda/expert_rows.hpp"
#include "cuda/row_table.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int row_threads = 256;
constexpr int in_flight = 4;  // loads of a lane

template <class Word>
FIVEDP_KERNEL(row_threads, 6)
gather(DeviceGather problem, std::int64_t words, int parts) {
    constexpr int warps = row_threads / 32;
    WarpItem item(block_x() * warps + warp(), blocks_x() * warps, parts);
    const char* from = item.row < problem.rows ? row_of(problem.from, item.row) : nullptr;
    while (item.row < problem.rows) {
        const WarpItem here = item;
        item.next();
        const char* const next = item.row < problem.rows ? row_of(problem.from, item.row) : nullptr;
        if (from != nullptr) {
            const std::int64_t first = static_cast<std::int64_t>(here.part) * (32 * in_flight) + lane();
            const Word* const source = reinterpret_cast<const Word*>(from) + first;
            Word* const to = reinterpret_cast<Word*>(problem.out + here.row * problem.out_stride) + first;
            Word kept[in_flight];
            FIVEDP_UNROLL
            for (int i = 0; i < in_flight; ++i)
                if (first + 32 * i < words) kept[i] = load_passing(source + 32 * i);
            FIVEDP_UNROLL
            for (int i = 0; i < in_flight; ++i)
                if (first + 32 * i < words) store_passing(to + 32 * i, kept[i]);
        }
        from = next;
    }
}

// N elements a load.
template <class T, int N>
FIVEDP_KERNEL(row_threads, 4)
weigh(DeviceWeightedRows problem, int parts) {
    using S = Sum<T>;
    constexpr int warps = row_threads / 32;
    for (WarpItem item(block_x() * warps + warp(), blocks_x() * warps, parts); item.row < problem.n_rows; item.next()) {
        const char* const from = row_of(problem.rows, item.row);
        if (from == nullptr) continue;
        const S weight = static_cast<const S*>(problem.weights)[item.row];
        const std::int64_t first = (static_cast<std::int64_t>(item.part) * (32 * in_flight) + lane()) * N;
        Pack<T, N> kept[in_flight];
        FIVEDP_UNROLL
        for (int i = 0; i < in_flight; ++i)
            if (first + 32 * N * i < problem.columns)
                kept[i] = *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(from) + first + 32 * N * i);
        FIVEDP_UNROLL
        for (int i = 0; i < in_flight; ++i) {
            if (first + 32 * N * i >= problem.columns) continue;
            S values[N];
            FIVEDP_UNROLL
            for (int j = 0; j < N; ++j) values[j] = weight * to_float(kept[i].at[j]);
            store_as(problem.out_type, problem.out + item.row * problem.out_stride, first + 32 * N * i, values);
        }
    }
}

// The CPU's order: 32 partial sums of float (16 of double), each by fused multiply-add in rising columns, then halves.
// Lane j has partial sum j; of 32 products of doubles lanes 16 to 31 hold every second one of a partial sum, and hand
// it over.
template <class A, class B>
FIVEDP_KERNEL(row_threads, 4)
dot(DeviceRowDots problem) {
    using S = Sum<A>;
    constexpr int warps = row_threads / 32, ahead = 8;
    for (std::int64_t row = block_x() * warps + warp(); row < problem.n_rows; row += blocks_x() * warps) {
        const A* const a = reinterpret_cast<const A*>(row_of(problem.a, row));
        const B* const b = reinterpret_cast<const B*>(row_of(problem.b, row));
        const std::int64_t columns = a != nullptr && b != nullptr ? problem.columns : 0;
        S sum = 0;
        for (std::int64_t first = lane(); first - lane() < columns; first += 32 * ahead) {
            A left[ahead];
            B right[ahead];
            FIVEDP_UNROLL
            for (int i = 0; i < ahead; ++i)
                if (first + 32 * i < columns) {
                    left[i] = a[first + 32 * i];
                    right[i] = b[first + 32 * i];
                }
            FIVEDP_UNROLL
            for (int i = 0; i < ahead; ++i) {
                // Columns that are not there change nothing: a sum of products that starts at 0 is never -0.
                const bool there = first + 32 * i < columns;
                const S x = there ? S(to_float(left[i])) : S(0), y = there ? S(to_float(right[i])) : S(0);
                sum = fused(x, y, sum);
                if constexpr (sizeof(S) == 8) sum = fused(warp_from(x, lane() + 16), warp_from(y, lane() + 16), sum);
            }
        }
        FIVEDP_UNROLL
        for (int half = 64 / static_cast<int>(sizeof(S)); half > 0; half /= 2) sum += warp_xor(sum, half);
        if (lane() == 0) static_cast<S*>(problem.out)[row] = sum;
    }
}

// As many blocks as have work, or as run at a time.
std::int64_t grid_of(std::int64_t items, int blocks_at_a_time) {
    const std::int64_t wanted = (items + row_threads / 32 - 1) / (row_threads / 32);
    const std::int64_t room = static_cast<std::int64_t>(blocks_at_a_time) * multiprocessors();
    return wanted < room ? wanted : room;
}

}  // namespace

void gather_rows(const DeviceGather& problem, Stream stream) {
    const std::int64_t words = problem.row_bytes / problem.word;
    const std::int64_t parts = (words + 32 * in_flight - 1) / (32 * in_flight);
    const auto start = [&](auto word) {
        launch(gather<decltype(word)>, grid_of(problem.rows * parts, 6), 1, 1, row_threads, 0, stream, problem, words,
               static_cast<int>(parts));
    };
    if (problem.word == 16)
        start(Word16());
    else if (problem.word == 4)
        start(std::uint32_t());
    else
        start(std::uint16_t());
}

void weighted_rows(const DeviceWeightedRows& problem, Stream stream) {
    with_type(problem.rows.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto start = [&](auto* kernel, std::int64_t n) {
            const std::int64_t parts = (problem.columns + 32 * in_flight * n - 1) / (32 * in_flight * n);
            launch(kernel, grid_of(problem.n_rows * parts, 4), 1, 1, row_threads, 0, stream, problem,
                   static_cast<int>(parts));
        };
        constexpr int n = 16 / sizeof(T);
        if (problem.aligned && problem.columns % n == 0)
            start(weigh<T, n>, n);
        else
            start(weigh<T, 1>, 1);
    });
}

void row_dots(const DeviceRowDots& problem, Stream stream) {
    const auto start = [&](auto* kernel) {
        launch(kernel, grid_of(problem.n_rows, 4), 1, 1, row_threads, 0, stream, problem);
    };
    with_type(problem.a.type, [&](auto a) {
        with_type(problem.b.type, [&](auto b) {
            using A = typename decltype(a)::type;
            using B = typename decltype(b)::type;
            if constexpr (sizeof(Sum<A>) == sizeof(Sum<B>)) start(dot<A, B>);
        });
    });
}

}  // namespace fivedp
