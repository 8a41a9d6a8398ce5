// Products of rows grouped by expert; where the groups end is known on the device only.
//
// matmul: out[i] = x[i] w[e], in pieces along K; hidden: the same with two products and the activation between them, or
// one; outer: out[e] = x_e^T y_e, the rows of a group as k. The main loop, the layout of shared memory and the
// order of a sum are those of gemm_tile.cuh; here all of K is one virtual shard, piece after piece (experts are
// never cut along it), so nothing waits in a workspace. An element's bits depend on its row and its expert alone.
//
// Blocks stay and take tiles (expert, columns, rows) in turns: each reads the offsets itself and walks through the
// experts once, so the host knows no sizes and waits for nothing. Rows lie anywhere: their addresses come from a table,
// and the copies to shared memory gather them. For hidden a tile has 64 columns of both products, in turns of 8, so
// that gate and up of an element meet in one thread's registers and neither needs to be stored. 2 R K N FLOPs (twice
// that with a gate); w is read once for every 128 rows of a group, x once for every 128 columns.
#include "cuda/activation.cuh"
#include "cuda/gemm_tile.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int blocks_of_multiprocessor = 2;

struct GroupedSource {
    const GroupedProblem& problem;
    TileOrigin origin;
    std::int64_t group_rows;  // k of an outer product

    FIVEDP_DEVICE int n_segments() const { return problem.n_pieces; }
    FIVEDP_DEVICE std::int64_t k(int i) const { return problem.kind == GroupedKind::outer ? group_rows : problem.k[i]; }
    FIVEDP_DEVICE int merges(int) const { return -1; }
    FIVEDP_DEVICE const GemmOperand& a(int i) const { return problem.x[i]; }
    FIVEDP_DEVICE const GemmOperand& b(int i) const { return problem.w[i]; }
    FIVEDP_DEVICE const GemmOperand* second() const { return problem.gated ? &problem.up_weights : nullptr; }
    FIVEDP_DEVICE void wait(int, std::int64_t) const {}
};

// A tile of the work list, and the expert it belongs to.
struct GroupedTile {
    std::int64_t expert = 0, first_row = 0, rows = 0;  // the group's
    std::int64_t before = 0;                           // tiles of earlier experts
};

FIVEDP_DEVICE std::int64_t least(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

template <class T>
FIVEDP_DEVICE char* place_in(const GemmResult& result, std::int64_t batch, std::int64_t row, std::int64_t column) {
    return result.data + batch * result.batch_stride + row * result.row_stride + column * result.column_stride;
}

// Rounded to T and back: an activation is of gate and up as they are stored.
template <class T>
FIVEDP_DEVICE Sum<T> stored(Sum<T> value) {
    return to_float(from_float<T>(value));
}

template <class T>
FIVEDP_DEVICE void write_product(const GemmSums<T>& sums, const GroupedProblem& problem, const TileOrigin& at,
                                 std::int64_t row, bool activated) {
    const GemmResult& out = problem.out;
    for_pairs(sums, [&](int r, int c, Sum<T> first, Sum<T> second) {
        if (r >= at.a_count || c >= at.b_count) return;
        const int n = c + 1 < at.b_count ? 2 : 1;
        if (activated) {
            if (problem.up.data != nullptr)
                store_pair<T>(place_in<T>(problem.up, 0, row + r, at.b_first + c), problem.up.column_stride, n, first,
                              second);
            first = activate(problem.activation, stored<T>(first));
            second = activate(problem.activation, stored<T>(second));
        }
        char* const to = place_in<T>(out, at.b_batch, row + r, at.b_first + c);
        if (out.is_sum)
            store_pair<Sum<T>>(to, out.column_stride, n, first, second);
        else
            store_pair<T>(to, out.column_stride, n, first, second);
    });
}

template <class T>
FIVEDP_DEVICE void write_gated(const GemmSums<T>& sums, const GroupedProblem& problem, const TileOrigin& at,
                               std::int64_t row) {
    using Tile = GemmTile<T>;
    const int first_row = warp() / 2 * Tile::of_warp + lane() / 4;
    const int first_column = warp() % 2 * (Tile::of_warp / 2) + lane() % 4 * 2;
    FIVEDP_UNROLL
    for (int i = 0; i < Tile::row_tiles; ++i) FIVEDP_UNROLL
    for (int half = 0; half < 2; ++half) FIVEDP_UNROLL
    for (int j = 0; j < Tile::column_tiles; j += 2) {
        const int r = first_row + 16 * i + 8 * half, c = first_column + 4 * j;
        if (r >= at.a_count || c >= at.b_count) continue;
        const int n = c + 1 < at.b_count ? 2 : 1;
        const Sum<T>(&gate)[4] = sums.at[i][j], (&up)[4] = sums.at[i][j + 1];
        const std::int64_t column = at.b_first + c;
        if (problem.gate.data != nullptr)
            store_pair<T>(place_in<T>(problem.gate, 0, row + r, column), problem.gate.column_stride, n, gate[2 * half],
                          gate[2 * half + 1]);
        if (problem.up.data != nullptr)
            store_pair<T>(place_in<T>(problem.up, 0, row + r, column), problem.up.column_stride, n, up[2 * half],
                          up[2 * half + 1]);
        Sum<T> hidden[2];
        FIVEDP_UNROLL
        for (int e = 0; e < 2; ++e)
            hidden[e] = rounded_product(activate(DeviceActivation::silu, stored<T>(gate[2 * half + e])),
                                        stored<T>(up[2 * half + e]));
        store_pair<T>(place_in<T>(problem.out, 0, row + r, column), problem.out.column_stride, n, hidden[0], hidden[1]);
    }
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
grouped_tiles(const GroupedProblem problem) {
    constexpr int size = GemmTile<T>::size;
    const bool outer = problem.kind == GroupedKind::outer;
    const int width = problem.gated ? size / 2 : size;
    const std::int64_t columns = (problem.n + width - 1) / width;
    GroupedTile at;
    const auto tiles_of = [&](std::int64_t rows) { return columns * (((outer ? problem.m : rows) + size - 1) / size); };
    const auto enter = [&] {  // expert at.expert, if there is one
        if (at.expert >= problem.n_experts) return;
        at.first_row = problem.offsets[at.expert];
        at.rows = problem.offsets[at.expert + 1] - at.first_row;
    };
    enter();
    for (std::int64_t tile = block_x();; tile += blocks_x()) {
        while (at.expert < problem.n_experts && tile - at.before >= tiles_of(at.rows)) {
            at.before += tiles_of(at.rows);
            ++at.expert;
            enter();
        }
        if (at.expert >= problem.n_experts) return;
        const std::int64_t of_expert = tile - at.before, height = tiles_of(at.rows) / columns;
        const std::int64_t row = of_expert % height * size, column = of_expert / height * width;
        GroupedSource source{problem, {}, at.rows};
        TileOrigin& origin = source.origin;
        origin.a_count = static_cast<int>(least((outer ? problem.m : at.rows) - row, size));
        origin.b_first = column;
        origin.b_count = static_cast<int>(least(problem.n - column, width));
        if (outer) {
            origin.a_first = row;
            origin.k_first = at.first_row;
        } else {
            origin.a_first = at.first_row + row;
        }
        // The weights of an outer product are rows, which know no experts; its result does.
        if (!outer) origin.b_batch = at.expert;
        GemmSums<T> sums;
        sum_tile<T>(sums, source, dynamic_shared(), OpenSums<T>{nullptr});
        if (problem.gated) {
            write_gated<T>(sums, problem, origin, origin.a_first);
        } else {
            origin.b_batch = outer ? at.expert : 0;
            write_product<T>(sums, problem, origin, origin.a_first, problem.kind == GroupedKind::hidden);
        }
    }
}

}  // namespace

void grouped_product(const GroupedProblem& problem, Stream stream) {
    with_type(problem.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        constexpr int size = GemmTile<T>::size;
        const int width = problem.gated ? size / 2 : size;
        // Each group has one tile row that is not full, at most.
        const std::int64_t rows =
            problem.kind == GroupedKind::outer
                ? problem.n_experts * ((problem.m + size - 1) / size)
                : problem.n_rows / size + (problem.n_experts < problem.n_rows ? problem.n_experts : problem.n_rows);
        const std::int64_t tiles = rows * ((problem.n + width - 1) / width);
        const std::int64_t at_once = static_cast<std::int64_t>(blocks_of_multiprocessor) * multiprocessors();
        launch(grouped_tiles<T>, tiles < at_once ? tiles : at_once, 1, 1, gemm_threads, GemmTile<T>::shared_bytes,
               stream, problem);
    });
}

}  // namespace fivedp
