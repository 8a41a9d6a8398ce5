// Products of rows grouped by expert; where the groups end is known on the device only.
//
// matmul: out[i] = x[i] w[e], in pieces along K; hidden: the same with two products and the activation between them, or
// one; outer: out[e] = x_e^T y_e, the rows of a group as k. The main loop, the layout of shared memory and the
// order of a sum are those of gemm_tile.cuh; here all of K is one virtual shard, piece after piece (experts are
// never cut along it), so nothing waits in a workspace. An element's bits depend on its row and its expert alone.
//
// Blocks find their tiles from the offsets (grouped_work.cuh). Rows lie anywhere: their addresses come from a table,
// and the copies to shared memory gather them. For hidden a tile has 64 columns of both products, in turns of 8, so
// that gate and up of an element meet in one block and neither needs to be stored. 2 R K N FLOPs (twice that with a
// gate); w is read once for every 128 rows of a group, x once for every 128 columns.
#include "cuda/gemm_tile.cuh"
#include "cuda/grouped_work.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int blocks_of_multiprocessor = 2;

template <class T>
constexpr int width_of(bool gated) {
    return gated ? GemmTile<T>::size / 2 : GemmTile<T>::size;
}

template <class T>
FIVEDP_DEVICE void write_product(const char* laid_down, const GroupedProblem& problem, const GroupedTile& tile) {
    for_laid<T, width_of<T>(false)>(tile.origin.a_count, tile.origin.b_count, [&](int r, int c, int n) {
        store_product<T>(problem, tile, r, c, n, laid<T>(laid_down, r, c));
    });
}

template <class T>
FIVEDP_DEVICE void write_gated(const char* laid_down, const GroupedProblem& problem, const TileOrigin at) {
    for_laid<T, width_of<T>(true)>(at.a_count, at.b_count, [&](int r, int c, int n) {
        const int turn = c / 8 * 16 + c % 8;
        store_gated<T>(problem, at, r, c, n, laid<T>(laid_down, r, turn), laid<T>(laid_down, r, turn + 8));
    });
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
grouped_tiles(const GroupedProblem problem) {
    // Not in registers, which are full of sums; thread 0 moves it on.
    GroupedTile& at = *reinterpret_cast<GroupedTile*>(dynamic_shared() + GemmTile<T>::shared_bytes);
    if (thread() == 0) at = first_tile(problem, width_of<T>(problem.gated));
    for (;;) {
        if (thread() == 0) advance(at, problem, GemmTile<T>::size, width_of<T>(problem.gated), blocks_x());
        sync_block();
        if (at.expert >= problem.n_experts) return;
        GroupedSource source{problem, at, at.origin};
        GemmSums<T> sums;
        sum_tile<T>(sums, source, dynamic_shared(), TileOpenSums<T>{nullptr});
        lay_down(sums, dynamic_shared());
        if (problem.gated)
            write_gated<T>(dynamic_shared(), problem, at.origin);
        else
            write_product<T>(dynamic_shared(), problem, at);
    }
}

}  // namespace

const char* grouped_product(const GroupedProblem& problem, bool hopper, Stream stream) {
    if (hopper && grouped_product_sm90(problem, stream)) return "sm90";
    with_type(problem.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const std::int64_t tiles = most_tiles(problem, GemmTile<T>::size, width_of<T>(problem.gated));
        const std::int64_t at_once = static_cast<std::int64_t>(blocks_of_multiprocessor) * multiprocessors();
        launch(grouped_tiles<T>, tiles < at_once ? tiles : at_once, 1, 1, gemm_threads,
               GemmTile<T>::shared_bytes + sizeof(GroupedTile), stream, problem);
    });
    return "sm80";
}

}  // namespace fivedp
