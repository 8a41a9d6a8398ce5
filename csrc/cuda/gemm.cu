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

// The tile that a block is at. It lies in shared memory, since registers are full of sums; thread 0 moves it on.
struct GemmPlace {
    std::int64_t number;
    TileOrigin origin;
};

struct GemmSource {
    const GemmProblem& problem;
    const TileOrigin& origin;
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
FIVEDP_DEVICE void write_tile(const char* laid_down, const GemmProblem& problem, const TileOrigin at) {
    const GemmResult& c = problem.c;
    const Sum<T> alpha = static_cast<Sum<T>>(problem.alpha), beta = static_cast<Sum<T>>(problem.beta);
    for_laid<T, GemmTile<T>::size>(at.a_count, at.b_count, [&](int row, int column, int n) {
        Vec16<Sum<T>> sum = laid<T>(laid_down, row, column);
        char* const to = c.data + at.a_batch * c.batch_stride + (at.a_first + row) * c.row_stride +
                         (at.b_first + column) * c.column_stride;
        FIVEDP_UNROLL
        for (int i = 0; i < Vec16<Sum<T>>::n; ++i) {
            if (alpha != 1) sum.at[i] = rounded_product(sum.at[i], alpha);
            if (beta != 0 && i < n) {
                const Sum<T> old = to_float(*reinterpret_cast<const Out*>(to + i * c.column_stride));
                sum.at[i] = rounded_sum(sum.at[i], rounded_product(beta, old));
            }
        }
        store_neighbours<Out>(to, c.column_stride, n, sum.at);
    });
}

// Moves on by `steps` tiles, called by one thread; nothing is left where the batch is then behind the last one.
template <class T>
FIVEDP_DEVICE void advance(GemmPlace& at, const GemmProblem& problem, std::int64_t steps) {
    constexpr int size = GemmTile<T>::size;
    const auto least = [](std::int64_t a, std::int64_t b) { return a < b ? a : b; };
    const std::int64_t rows = (problem.m + size - 1) / size, columns = (problem.n + size - 1) / size;
    at.number += steps;
    const std::int64_t of_matrix = at.number % (rows * columns);
    const std::int64_t band = of_matrix / (rows_at_a_time * columns), of_band = of_matrix % (rows_at_a_time * columns);
    const std::int64_t height = least(rows - band * rows_at_a_time, rows_at_a_time);
    TileOrigin& origin = at.origin;
    origin.a_batch = origin.b_batch = at.number / (rows * columns);
    origin.a_first = (band * rows_at_a_time + of_band % height) * size;
    origin.b_first = of_band / height * size;
    origin.a_count = static_cast<int>(least(problem.m - origin.a_first, size));
    origin.b_count = static_cast<int>(least(problem.n - origin.b_first, size));
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
gemm_tiles(const GemmProblem problem) {
    GemmPlace& at = *reinterpret_cast<GemmPlace*>(dynamic_shared() + GemmTile<T>::shared_bytes);
    if (thread() == 0) at = {block_x() - blocks_x(), {}};
    for (;;) {
        if (thread() == 0) advance<T>(at, problem, blocks_x());
        sync_block();
        if (at.origin.a_batch >= problem.batch) return;
        if (problem.ready != nullptr && problem.ready_along_m)
            wait_for_flags(problem.ready, at.origin.a_first / problem.panel,
                           (at.origin.a_first + at.origin.a_count - 1) / problem.panel);
        constexpr std::int64_t of_tile = OpenSums<T>::of_tile;
        const OpenSums<T> open{static_cast<Sum<T>*>(problem.workspace) + block_x() * problem.n_open * of_tile};
        TypedGemmSource<T> source{{problem, at.origin}};
        GemmSums<T> sums;
        sum_tile<T>(sums, source, dynamic_shared(), open);
        lay_down(sums, dynamic_shared());
        if (problem.c.is_sum)
            write_tile<T, Sum<T>>(dynamic_shared(), problem, at.origin);
        else
            write_tile<T, T>(dynamic_shared(), problem, at.origin);
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
        launch(gemm_tiles<T>, blocks, 1, 1, gemm_threads, GemmTile<T>::shared_bytes + sizeof(GemmPlace), stream,
               problem);
    });
}

}  // namespace fivedp
