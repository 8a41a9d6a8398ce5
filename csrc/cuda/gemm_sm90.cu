// The product of gemm.cu for 16-bit types on compute capability 9.x: C = alpha * A B + beta * C, in the canonical order
// of K, with wgmma and TMA. gemm_hopper_tile.cuh has the main loop, its warps and its shared memory; gemm_work.cuh the
// order of tiles and the flags.
//
// What brings factors waits for the flags of the panels before it copies them, also with the copy engine. 2 m n k
// FLOPs; each panel of A is read n / 256 times and each of B m / 128 times, mostly from L2; C is written once. Of 8
// shards 7 tiles of sums (128 KiB) are written and read once for each tile, which the L2 cache serves.
#include "cuda/gemm_hopper_tile.cuh"
#include "cuda/gemm_work.cuh"

namespace fivedp {
namespace {

using GemmBoxes = ProductBoxes<max_gemm_segments>;

template <class T, class Out>
FIVEDP_DEVICE void write_tile(const ProductSums& sums, const GemmProblem& problem, const TileOrigin& at) {
    for_slices<false>(sums, at.a_count, at.b_count,
                      [&](int row, int column, int n, const Vec16<float>& found, const Vec16<float>&) {
                          store_scaled<T, Out>(problem, at, row, column, n, found);
                      });
}

template <class T, bool a_along_k, bool b_along_k>
FIVEDP_KERNEL(product_threads, 1)
gemm_wgmma(const FIVEDP_GRID_CONSTANT GemmProblem problem, const FIVEDP_GRID_CONSTANT GemmBoxes boxes) {
#ifdef FIVEDP_HOPPER
    open_product_barriers();
    GemmPlace at{block_x() - blocks_x(), {}};
    const auto next = [&] {
        advance<product_rows, product_columns>(at, problem, blocks_x());
        return at.origin.a_batch < problem.batch;
    };
    const int me = warp();
    if (me < multiplying_warps) {
        raise_registers<multiplying_registers>();
        constexpr std::int64_t of_tile = ProductOpenSums::of_tile;
        const ProductOpenSums open{static_cast<float*>(problem.workspace) + block_x() * problem.n_open * of_tile};
        ProductTurn turn;
        while (next()) {
            const GemmSource<product_depth> source{problem, at.origin};
            ProductSums sums;
            multiply_tile<T, a_along_k, b_along_k>(sums, turn, source, me / 4, open);
            if (problem.c.is_sum)
                write_tile<T, float>(sums, problem, at.origin);
            else
                write_tile<T, T>(sums, problem, at.origin);
        }
    } else {
        lower_registers<bringing_registers>();
        Bringing state;
        while (next()) {
            wait_for_rows(problem, at.origin, [&] { state.arrive_for_all(); });
            GemmSource<product_depth> source{problem, at.origin};
            bring_tile<T, a_along_k, b_along_k>(state, source, boxes, me - multiplying_warps);
        }
        state.arrive_for_all();
    }
#else
    trap();
#endif
}

std::int64_t gemm_blocks(std::int64_t batch, std::int64_t m, std::int64_t n) {
    const std::int64_t rows = (m + product_rows - 1) / product_rows;
    const std::int64_t columns = (n + product_columns - 1) / product_columns;
    return batch * rows * columns < multiprocessors() ? batch * rows * columns : multiprocessors();
}

constexpr std::int64_t tile_bytes = ProductOpenSums::of_tile * sizeof(float);

template <class T, bool a_along_k, bool b_along_k>
bool start(const GemmProblem& problem, Stream stream) {
    if (!built_for_hopper(gemm_wgmma<T, a_along_k, b_along_k>)) return false;
    std::int64_t blocks = gemm_blocks(problem.batch, problem.m, problem.n);
    if (problem.n_open > 0) blocks = least(blocks, problem.workspace_bytes / (problem.n_open * tile_bytes));
    if (blocks <= 0) return true;
    GemmBoxes boxes{};
    for (int i = 0; i < problem.n_segments; ++i) {
        const GemmSegment& segment = problem.segments[i];
        const bool a = box_of(problem.type, segment.a, problem.m, segment.k, problem.batch, boxes.a[i]);
        const bool b = box_of(problem.type, segment.b, problem.n, segment.k, problem.batch, boxes.b[i]);
        boxes.a_boxed |= static_cast<std::uint32_t>(a) << i;
        boxes.b_boxed |= static_cast<std::uint32_t>(b) << i;
    }
    launch(gemm_wgmma<T, a_along_k, b_along_k>, blocks, 1, 1, product_threads, product_shared_bytes, stream, problem,
           boxes);
    return true;
}

template <class T>
bool start_turned(GemmProblem problem, Stream stream) {
    const auto k = [&](int i) { return problem.segments[i].k; };
    const auto a = [&](int i) -> GemmOperand& { return problem.segments[i].a; };
    const auto b = [&](int i) -> GemmOperand& { return problem.segments[i].b; };
    const bool a_along_k = turn_alike(problem.n_segments, a, k), b_along_k = turn_alike(problem.n_segments, b, k);
    if (a_along_k) return (b_along_k ? start<T, true, true> : start<T, true, false>)(problem, stream);
    return (b_along_k ? start<T, false, true> : start<T, false, false>)(problem, stream);
}

}  // namespace

std::int64_t gemm_workspace_sm90(std::int64_t batch, std::int64_t m, std::int64_t n, int n_open) {
    return gemm_blocks(batch, m, n) * n_open * tile_bytes;
}

bool gemm_sm90(const GemmProblem& problem, Stream stream) {
    if (element_bytes(problem.type) != 2 || compute_capability() / 10 != 9) return false;
    return problem.type == DeviceType::bf16 ? start_turned<Bf16>(problem, stream) : start_turned<Half>(problem, stream);
}

}  // namespace fivedp
