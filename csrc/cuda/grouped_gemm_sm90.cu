// The products of grouped_gemm.cu, of rows grouped by expert, for 16-bit types on compute capability 9.x, with wgmma
// and TMA. gemm_hopper_tile.cuh has the main loop, its warps and its shared memory; grouped_work.cuh the order of tiles
// and what becomes of sums.
//
// matmul and hidden: a box of rows of x may reach into the next group, whose sums are then not stored. outer: rows are
// the k of the sum; 64 of them come as boxes where all belong to the group, the last ones of a group are copied one by
// one, with zeros behind them. With a gate a tile has 128 columns of both products. 2 R K N FLOPs (twice that with a
// gate); w is read once for every 128 rows of a group, x once for every 256 columns (128 with a gate).
#include "cuda/gemm_hopper_tile.cuh"
#include "cuda/grouped_work.cuh"

namespace fivedp {
namespace {

using GroupedBoxes = ProductBoxes<max_grouped_pieces>;

constexpr FIVEDP_HOST_DEVICE int width_of(bool gated) {
    return gated ? product_columns / 2 : product_columns;
}

template <class T>
FIVEDP_DEVICE void write_tile(const ProductSums& sums, const GroupedProblem& problem, const GroupedTile& tile) {
    const int n_rows = tile.origin.a_count, n_columns = tile.origin.b_count;
    if (problem.gated)
        for_slices<true>(sums, n_rows, n_columns,
                         [&](int row, int column, int n, const Vec16<float>& gate, const Vec16<float>& up) {
                             store_gated<T>(problem, tile.origin, row, column, n, gate, up);
                         });
    else
        for_slices<false>(sums, n_rows, n_columns,
                          [&](int row, int column, int n, const Vec16<float>& found, const Vec16<float>&) {
                              store_product<T>(problem, tile, row, column, n, found);
                          });
}

template <class T, bool a_along_k, bool b_along_k>
FIVEDP_KERNEL(product_threads, 1)
grouped_wgmma(const FIVEDP_GRID_CONSTANT GroupedProblem problem, const FIVEDP_GRID_CONSTANT GroupedBoxes boxes) {
#ifdef FIVEDP_HOPPER
    open_product_barriers();
    const int width = width_of(problem.gated);
    GroupedTile at = first_tile(problem, width);
    const auto next = [&] {
        advance(at, problem, product_rows, width, blocks_x());
        return at.expert < problem.n_experts;
    };
    const int me = warp();
    if (me < multiplying_warps) {
        raise_registers<multiplying_registers>();
        ProductTurn turn;
        while (next()) {
            const GroupedSource source{problem, at, at.origin};
            ProductSums sums;
            multiply_tile<T, a_along_k, b_along_k>(sums, turn, source, me / 4, ProductOpenSums{nullptr});
            write_tile<T>(sums, problem, at);
        }
    } else {
        lower_registers<bringing_registers>();
        Bringing state;
        while (next()) {
            GroupedSource source{problem, at, at.origin};
            bring_tile<T, a_along_k, b_along_k>(state, source, boxes, me - multiplying_warps);
        }
        state.arrive_for_all();
    }
#else
    trap();
#endif
}

template <class T, bool a_along_k, bool b_along_k>
bool start(const GroupedProblem& problem, Stream stream) {
    if (!built_for_hopper(grouped_wgmma<T, a_along_k, b_along_k>)) return false;
    const std::int64_t blocks = least(most_tiles(problem, product_rows, width_of(problem.gated)), multiprocessors());
    if (blocks <= 0) return true;
    const bool outer = problem.kind == GroupedKind::outer;
    GroupedBoxes boxes{};
    for (int i = 0; i < problem.n_pieces; ++i) {
        const std::int64_t k = outer ? problem.n_rows : problem.k[i];
        const bool x = box_of(problem.type, problem.x[i], outer ? problem.m : problem.n_rows, k, 1, boxes.a[i]);
        const bool w = box_of(problem.type, problem.w[i], problem.n, k, problem.n_experts, boxes.b[i]);
        boxes.a_boxed |= static_cast<std::uint32_t>(x) << i;
        boxes.b_boxed |= static_cast<std::uint32_t>(w) << i;
    }
    if (problem.gated)
        boxes.second_boxed =
            box_of(problem.type, problem.up_weights, problem.n, problem.k[0], problem.n_experts, boxes.second);
    launch(grouped_wgmma<T, a_along_k, b_along_k>, blocks, 1, 1, product_threads, product_shared_bytes, stream, problem,
           boxes);
    return true;
}

template <class T>
bool start_turned(GroupedProblem problem, Stream stream) {
    // Rows of x lie one way round: they are the k of an outer product, and rows of the result otherwise.
    if (problem.kind == GroupedKind::outer) return start<T, true, true>(problem, stream);
    const auto k = [&](int i) { return problem.k[i]; };
    const auto w = [&](int i) -> GemmOperand& { return problem.w[i]; };
    const bool along_k = turn_alike(problem.n_pieces, w, k);
    return (along_k ? start<T, false, true> : start<T, false, false>)(problem, stream);
}

}  // namespace

bool grouped_product_sm90(const GroupedProblem& problem, Stream stream) {
    if (element_bytes(problem.type) != 2 || compute_capability() / 10 != 9) return false;
    return problem.type == DeviceType::bf16 ? start_turned<Bf16>(problem, stream) : start_turned<Half>(problem, stream);
}

}  // namespace fivedp
