// C = alpha * A B + beta * C with the order of the sum over k fixed by the virtual shards alone (gemm_tile.cuh has the
// main loop, the layout of shared memory and the order).
//
// Blocks stay and take tiles in turns: of a batch, matrix by matrix; within it, 8 rows of tiles at a time, column by
// column, so that the blocks at work at one time read few panels of A and B, from the L2 cache. A block waits for the
// flags of the panels it is about to copy, so that the product may start on what has arrived. 2 m n k FLOPs; each panel
// of A is read n / 128 times and each of B m / 128 times, mostly from L2; C is written once.
#include "cuda/gemm_tile.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int blocks_of_multiprocessor = 2, rows_at_a_time = 8;

struct GemmSource {
    const GemmProblem& problem;
    TileOrigin origin;
    std::int64_t arrived = 0;  // panels of k known to be ready

    FIVEDP_DEVICE int n_segments() const { return problem.n_segments; }
    FIVEDP_DEVICE std::int64_t k(int i) const { return problem.segments[i].k; }
    FIVEDP_DEVICE int merges(int i) const { return problem.segments[i].merges; }
    FIVEDP_DEVICE const GemmOperand& a(int i) const { return problem.segments[i].a; }
    FIVEDP_DEVICE const GemmOperand& b(int i) const { return problem.segments[i].b; }
    FIVEDP_DEVICE const GemmOperand* second() const { return nullptr; }

    // Before k .. of segment i is copied.
    template <int depth>
    FIVEDP_DEVICE void wait_for(int i, std::int64_t k) {
        if (problem.ready == nullptr || problem.ready_along_m) return;
        const GemmSegment& segment = problem.segments[i];
        const std::int64_t end = k + depth < segment.k ? k + depth : segment.k;
        const std::int64_t last = (segment.first_k + end - 1) / problem.panel;
        if (last < arrived) return;
        wait_for_flags(problem.ready, arrived, last);
        arrived = last + 1;
    }
};

template <class T>
struct TypedGemmSource : GemmSource {
    FIVEDP_DEVICE void wait(int i, std::int64_t k) { this->template wait_for<GemmTile<T>::depth>(i, k); }
};

template <class T, class Out>
FIVEDP_DEVICE void write_tile(const GemmSums<T>& sums, const GemmProblem& problem, std::int64_t batch,
                              std::int64_t first_row, std::int64_t first_column) {
    const GemmResult& c = problem.c;
    const Sum<T> alpha = static_cast<Sum<T>>(problem.alpha), beta = static_cast<Sum<T>>(problem.beta);
    for_pairs(sums, [&](int row, int column, Sum<T> first, Sum<T> second) {
        const std::int64_t left = problem.n - first_column - column;
        if (first_row + row >= problem.m || left <= 0) return;
        const int n = left > 1 ? 2 : 1;
        char* const to = c.data + batch * c.batch_stride + (first_row + row) * c.row_stride +
                         (first_column + column) * c.column_stride;
        if (alpha != 1) first = rounded_product(first, alpha), second = rounded_product(second, alpha);
        if (beta != 0) {
            first = rounded_sum(first, rounded_product(beta, to_float(*reinterpret_cast<const Out*>(to))));
            if (n == 2)
                second = rounded_sum(
                    second, rounded_product(beta, to_float(*reinterpret_cast<const Out*>(to + c.column_stride))));
        }
        store_pair<Out>(to, c.column_stride, n, first, second);
    });
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
gemm_tiles(const GemmProblem problem) {
    constexpr int size = GemmTile<T>::size;
    const std::int64_t rows = (problem.m + size - 1) / size, columns = (problem.n + size - 1) / size;
    for (std::int64_t tile = block_x(); tile < problem.batch * rows * columns; tile += blocks_x()) {
        const std::int64_t batch = tile / (rows * columns), of_matrix = tile % (rows * columns);
        const std::int64_t band = of_matrix / (rows_at_a_time * columns),
                           of_band = of_matrix % (rows_at_a_time * columns);
        const std::int64_t height =
            rows - band * rows_at_a_time < rows_at_a_time ? rows - band * rows_at_a_time : rows_at_a_time;
        const std::int64_t row = (band * rows_at_a_time + of_band % height) * size, column = of_band / height * size;
        TypedGemmSource<T> source{{problem, {}}};
        source.origin.a_first = row;
        source.origin.b_first = column;
        source.origin.a_count = static_cast<int>(problem.m - row < size ? problem.m - row : size);
        source.origin.b_count = static_cast<int>(problem.n - column < size ? problem.n - column : size);
        source.origin.a_batch = source.origin.b_batch = batch;
        if (problem.ready != nullptr && problem.ready_along_m)
            wait_for_flags(problem.ready, row / problem.panel, (row + source.origin.a_count - 1) / problem.panel);
        const OpenSums<T> open{static_cast<Sum<T>*>(problem.workspace) + block_x() * problem.n_open * size * size};
        GemmSums<T> sums;
        sum_tile<T>(sums, source, dynamic_shared(), open);
        if (problem.c.is_sum)
            write_tile<T, Sum<T>>(sums, problem, batch, row, column);
        else
            write_tile<T, T>(sums, problem, batch, row, column);
    }
}

std::int64_t tile_bytes(DeviceType type) {
    return type == DeviceType::f64 ? 64 * 64 * 8 : 128 * 128 * 4;
}

std::int64_t gemm_blocks(DeviceType type, std::int64_t batch, std::int64_t m, std::int64_t n) {
    const std::int64_t size = type == DeviceType::f64 ? 64 : 128;
    const std::int64_t tiles = batch * ((m + size - 1) / size) * ((n + size - 1) / size);
    const std::int64_t at_once = static_cast<std::int64_t>(blocks_of_multiprocessor) * multiprocessors();
    return tiles < at_once ? tiles : at_once;
}

}  // namespace

std::int64_t gemm_workspace(DeviceType type, std::int64_t batch, std::int64_t m, std::int64_t n, int n_open) {
    return gemm_blocks(type, batch, m, n) * n_open * tile_bytes(type);
}

void gemm(const GemmProblem& problem, Stream stream) {
    std::int64_t blocks = gemm_blocks(problem.type, problem.batch, problem.m, problem.n);
    if (problem.n_open > 0) {
        const std::int64_t room = problem.workspace_bytes / (problem.n_open * tile_bytes(problem.type));
        blocks = blocks < room ? blocks : room;
    }
    with_type(problem.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        launch(gemm_tiles<T>, blocks, 1, 1, gemm_threads, GemmTile<T>::shared_bytes, stream, problem);
    });
}

}  // namespace fivedp
