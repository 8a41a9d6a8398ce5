// C = alpha * A B + beta * C with the order of the sum over k fixed by the virtual shards alone (gemm_tile.cuh has the
// main loop, the layout of shared memory and the order).
//
// A block waits for the flags of the panels it is about to copy, so that the product may start on what has arrived.
// 2 m n k FLOPs; each panel of A is read n / 128 times and each of B m / 128 times, mostly from L2, where the order of
// the tiles (gemm_work.cuh) keeps them; C is written once.
#include "cuda/gemm_tile.cuh"
#include "cuda/gemm_work.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int blocks_of_multiprocessor = 2;

template <class T, class Out>
FIVEDP_DEVICE void write_tile(const char* laid_down, const GemmProblem& problem, const TileOrigin at) {
    for_laid<T, GemmTile<T>::size>(at.a_count, at.b_count, [&](int row, int column, int n) {
        store_scaled<T, Out>(problem, at, row, column, n, laid<T>(laid_down, row, column));
    });
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
gemm_tiles(const GemmProblem problem) {
    // Not in registers, which are full of sums; thread 0 moves it on.
    GemmPlace& at = *reinterpret_cast<GemmPlace*>(dynamic_shared() + GemmTile<T>::shared_bytes);
    if (thread() == 0) at = {block_x() - blocks_x(), {}};
    for (;;) {
        if (thread() == 0) advance<GemmTile<T>::size, GemmTile<T>::size>(at, problem, blocks_x());
        sync_block();
        if (at.origin.a_batch >= problem.batch) return;
        wait_for_rows(problem, at.origin);
        constexpr std::int64_t of_tile = TileOpenSums<T>::of_tile;
        const TileOpenSums<T> open{static_cast<Sum<T>*>(problem.workspace) + block_x() * problem.n_open * of_tile};
        GemmSource<GemmTile<T>::depth> source{problem, at.origin};
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

std::int64_t gemm_workspace(DeviceType type, bool hopper, std::int64_t batch, std::int64_t m, std::int64_t n,
                            int n_open) {
    if (hopper && element_bytes(type) == 2) return gemm_workspace_sm90(batch, m, n, n_open);  // no less
    return gemm_blocks(type, batch, m, n) * n_open * tile_bytes(type);
}

const char* gemm(const GemmProblem& problem, bool hopper, Stream stream) {
    if (hopper && gemm_sm90(problem, stream)) return "sm90";
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
    return "sm80";
}

}  // namespace fivedp
