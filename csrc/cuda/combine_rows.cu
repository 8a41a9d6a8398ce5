// The sum over a token's experts, in the CPU's tree over expert ids: the same bits (csrc/cpu/experts.hpp).
//
// The tree halves [0, E) again and again; a node is the sum of its two halves, absent experts are skipped. Of n rows in
// rising order of experts, gap g (between rows g - 1 and g) has the depth of the lowest common ancestor of its experts;
// its node adds the sum that begins at row g to the one that begins at the last row before g whose gap is less deep (at
// row 0 if there is none). So a token's tree is n - 1 pairs (left, g), all lanes of a warp finding one each. Done by
// falling left, then rising g, every sum is complete when it is added.
//
// A warp has a row of the result, or a part of one where rows are few. It finds the tree once, then goes through the
// columns: up to K rows' elements are loaded together (K = 2, 4, 8, 16: the kernel is chosen by what most tokens have),
// 64 numbers a lane in registers (32 of double), 128 bytes of bfloat16 or 256 of float32 in flight a lane; then the
// pairs are added, register to register, by branches that a whole warp takes together. Tokens with more rows than K go
// column by column through a stack whose places are the depths of the open sums.
//
// Occupancy: 16 warps of 32 lanes with 128 bytes in flight each are 64 KiB on a multiprocessor, twice what an H200
// needs. Bytes: a row read once and the result written once: T = 2048, k = 2, H = 4096 in bfloat16 are 50 MB, 10.5 us
// at 4.8 TB/s, 14 us at 85 % of what a copy reaches (about 4.2 TB/s).
#include "cuda/expert_rows.hpp"
#include "cuda/row_table.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int combine_warps = 4;
constexpr int levels = 16;  // of the tree over most_combined_experts

// How deep the lowest common ancestor of two experts, a < b, lies in the tree that halves [0, n), the first half
// getting the odd one.
FIVEDP_DEVICE int common_depth(int n, int a, int b) {
    int begin = 0;
    for (int depth = 0; depth < levels; ++depth) {
        const int half = begin + (n + 1) / 2;
        if (a < half && b >= half) return depth;
        if (a < half) {
            n = (n + 1) / 2;
        } else {
            n -= (n + 1) / 2;
            begin = half;
        }
    }
    return levels - 1;  // experts that do not rise
}

// How many elements a load has, and how many loads of a row are under way, in a kernel for K rows.
template <class T, int K, bool aligned>
struct CombineShape {
    static constexpr int numbers = sizeof(Sum<T>) == 8 || !aligned ? 32 : 64;
    static constexpr int widest = aligned ? 16 / static_cast<int>(sizeof(T)) : 1;
    static constexpr int elements = widest < numbers / K ? widest : numbers / K;
    static constexpr int loads = numbers / (K * elements);
    static constexpr int columns = 32 * loads * elements;  // of a warp
};

template <class T>
FIVEDP_DEVICE void combine_by_depth(const DeviceCombine& problem, std::int64_t output, std::int64_t begin,
                                    std::int64_t end, std::int64_t first, std::int64_t step) {
    using S = Sum<T>;
    for (std::int64_t column = first; column < problem.columns; column += step) {
        S open[levels], sum = 0;
        std::uint32_t is_open = 0;
        FIVEDP_UNROLL
        for (int depth = 0; depth < levels; ++depth) open[depth] = 0;
        FIVEDP_NO_UNROLL
        for (std::int64_t p = begin; p < end; ++p) {
            const char* const from = row_of(problem.rows, p);
            const S weight = problem.weights != nullptr ? static_cast<const S*>(problem.weights)[p] : S(1);
            sum =
                from != nullptr ? rounded_product(weight, S(to_float(reinterpret_cast<const T*>(from)[column]))) : S(0);
            const int next =
                p + 1 < end ? common_depth(problem.n_experts, problem.experts[p], problem.experts[p + 1]) : -1;
            FIVEDP_UNROLL
            for (int depth = levels - 1; depth >= 0; --depth) {
                if (depth > next && (is_open >> depth & 1)) {
                    sum = open[depth] + sum;
                    is_open &= ~(1u << depth);
                }
                if (depth == next) {
                    open[depth] = sum;
                    is_open |= 1u << depth;
                }
            }
        }
        const S one[1] = {sum};
        store_as(problem.out_type, problem.out + output * problem.out_stride, column, one);
    }
}

template <class T, int K, bool aligned>
FIVEDP_KERNEL(32 * combine_warps, K <= 8 ? 4 : 3)
combine(DeviceCombine problem, int parts) {
    using S = Sum<T>;
    using Shape = CombineShape<T, K, aligned>;
    constexpr int N = Shape::elements, V = Shape::loads;
    for (WarpItem item(block_x() * combine_warps + warp(), blocks_x() * combine_warps, parts);
         item.row < problem.outputs; item.next()) {
        const std::int64_t begin = problem.starts[item.row], end = problem.starts[item.row + 1];
        if (end - begin > K) {
            combine_by_depth<T>(problem, item.row, begin, end, 32 * item.part + lane(), 32 * parts);
            continue;
        }
        // Lane p has row p: its place, its weight, and the pair of the gap before it.
        const int n = static_cast<int>(end - begin);
        const bool mine = lane() < n;
        const int expert = mine ? problem.experts[begin + lane()] : 0, before = warp_up(expert, 1);
        const std::int64_t place = mine ? reinterpret_cast<std::int64_t>(row_of(problem.rows, begin + lane())) : 0;
        const S its_weight =
            mine && problem.weights != nullptr ? static_cast<const S*>(problem.weights)[begin + lane()] : S(1);
        const int depth = mine && lane() > 0 ? common_depth(problem.n_experts, before, expert) : 0;
        int left = mine && lane() > 0 ? 0 : -1;
        FIVEDP_UNROLL
        for (int gap = 1; gap < K - 1; ++gap) {
            const int other = warp_from(depth, gap);
            if (left >= 0 && gap < lane() && other < depth) left = gap;
        }
        std::uint32_t added[K];  // to the sum that begins at row i: the sums that begin at these rows
        const char* from[K];
        S weight[K];
        FIVEDP_UNROLL
        for (int i = 0; i < K; ++i) {
            added[i] = warp_ballot(left == i);
            from[i] = reinterpret_cast<const char*>(warp_from(place, i));
            weight[i] = warp_from(its_weight, i);
        }
        FIVEDP_NO_UNROLL
        for (std::int64_t start = static_cast<std::int64_t>(item.part) * Shape::columns; start < problem.columns;
             start += static_cast<std::int64_t>(parts) * Shape::columns) {
            const std::int64_t column = start + lane() * N;
            Pack<T, N> read[K][V];
            FIVEDP_UNROLL
            for (int i = 0; i < K; ++i) FIVEDP_UNROLL
            for (int v = 0; v < V; ++v) {
                if (from[i] != nullptr && column + 32 * N * v < problem.columns)
                    read[i][v] =
                        *reinterpret_cast<const Pack<T, N>*>(reinterpret_cast<const T*>(from[i]) + column + 32 * N * v);
                else
                    read[i][v] = {};
            }
            S sum[K][V][N];
            FIVEDP_UNROLL
            for (int i = 0; i < K; ++i) FIVEDP_UNROLL
            for (int v = 0; v < V; ++v) FIVEDP_UNROLL
            for (int j = 0; j < N; ++j) sum[i][v][j] = rounded_product(weight[i], S(to_float(read[i][v].at[j])));
            FIVEDP_UNROLL
            for (int i = K - 2; i >= 0; --i) FIVEDP_UNROLL
            for (int g = i + 1; g < K; ++g)
                if (added[i] >> g & 1) {
                    FIVEDP_UNROLL
                    for (int v = 0; v < V; ++v) FIVEDP_UNROLL
                    for (int j = 0; j < N; ++j) sum[i][v][j] += sum[g][v][j];
                }
            FIVEDP_UNROLL
            for (int v = 0; v < V; ++v)
                if (column + 32 * N * v < problem.columns)
                    store_as(problem.out_type, problem.out + item.row * problem.out_stride, column + 32 * N * v,
                             sum[0][v]);
        }
    }
}

template <class T, int K, bool aligned>
void start(const DeviceCombine& problem, Stream stream) {
    constexpr std::int64_t columns = CombineShape<T, K, aligned>::columns;
    // Warps that run at a time; a row is cut where there are fewer.
    const std::int64_t room = (K <= 8 ? 4 : 3) * combine_warps * static_cast<std::int64_t>(multiprocessors());
    const std::int64_t most_parts = (problem.columns + columns - 1) / columns;
    std::int64_t parts = problem.outputs > 0 ? room / problem.outputs : 1;
    parts = parts < 1 ? 1 : parts > most_parts ? most_parts : parts;
    const std::int64_t warps = problem.outputs * parts < room ? problem.outputs * parts : room;
    launch(combine<T, K, aligned>, (warps + combine_warps - 1) / combine_warps, 1, 1, 32 * combine_warps, 0, stream,
           problem, static_cast<int>(parts));
}

}  // namespace

void combine_rows(const DeviceCombine& problem, Stream stream) {
    with_type(problem.rows.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (!problem.aligned || problem.columns % (16 / static_cast<std::int64_t>(sizeof(T))) != 0)
            return start<T, 8, false>(problem, stream);
        if (problem.most <= 2) return start<T, 2, true>(problem, stream);
        if (problem.most <= 4) return start<T, 4, true>(problem, stream);
        if (problem.most <= 8) return start<T, 8, true>(problem, stream);
        start<T, 16, true>(problem, stream);
    });
}

}  // namespace fivedp
