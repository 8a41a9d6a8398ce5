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
// that gate and up of an element meet in one block and neither needs to be stored. 2 R K N FLOPs (twice that with a
// gate); w is read once for every 128 rows of a group, x once for every 128 columns.
#include "cuda/activations.cuh"
#include "cuda/gemm_tile.cuh"
#include "cuda/with_type.cuh"

namespace fivedp {
namespace {

constexpr int blocks_of_multiprocessor = 2;

// Where a block is in the work list. It lies in shared memory, since registers are full of sums; thread 0 moves it on.
struct GroupedTile {
    std::int64_t number;                   // of the tile
    std::int64_t columns;                  // of tiles of an expert
    std::int64_t before;                   // tiles of earlier experts
    std::int64_t expert, first_row, rows;  // the group's
    TileOrigin origin;
};

struct GroupedSource {
    const GroupedProblem& problem;
    const GroupedTile& tile;
    const TileOrigin& origin;

    FIVEDP_DEVICE int n_segments() const { return problem.n_pieces; }
    FIVEDP_DEVICE std::int64_t k(int i) const { return problem.kind == GroupedKind::outer ? tile.rows : problem.k[i]; }
    FIVEDP_DEVICE int merges(int) const { return -1; }
    FIVEDP_DEVICE const GemmOperand& a(int i) const { return problem.x[i]; }
    FIVEDP_DEVICE const GemmOperand& b(int i) const { return problem.w[i]; }
    FIVEDP_DEVICE const GemmOperand* second() const { return problem.gated ? &problem.up_weights : nullptr; }
    FIVEDP_DEVICE void wait(int, std::int64_t) const {}
};

FIVEDP_DEVICE std::int64_t least(std::int64_t a, std::int64_t b) {
    return a < b ? a : b;
}

template <class T>
FIVEDP_DEVICE char* place_in(const GemmResult& result, std::int64_t batch, std::int64_t row, std::int64_t column) {
    return result.data + batch * result.batch_stride + row * result.row_stride + column * result.column_stride;
}

// Some neighbours of a row, rounded to T, to the place in a result that may not be wanted.
template <class T>
FIVEDP_DEVICE void keep(const GemmResult& result, std::int64_t row, std::int64_t column, int n,
                        const Vec16<Sum<T>>& sums) {
    if (result.data != nullptr)
        store_neighbours<T>(place_in<T>(result, 0, row, column), result.column_stride, n, sums.at);
}

// The activation is one of gate or up as they are stored.
template <class T>
FIVEDP_DEVICE Vec16<Sum<T>> activate(Activation activation, const Vec16<Sum<T>>& sums) {
    T stored[Vec16<Sum<T>>::n];
    FIVEDP_UNROLL
    for (int i = 0; i < Vec16<Sum<T>>::n; ++i) stored[i] = from_float<T>(sums.at[i]);
    Vec16<Sum<T>> values, slopes;
    activate_all(activation, stored, values.at, slopes.at);
    return values;
}

template <class T>
FIVEDP_DEVICE void write_product(const char* laid_down, const GroupedProblem& problem, const GroupedTile& tile) {
    const GemmResult& out = problem.out;
    const TileOrigin at = tile.origin;
    const std::int64_t expert = problem.kind == GroupedKind::outer ? tile.expert : 0;
    for_laid<T, GemmTile<T>::size>(at.a_count, at.b_count, [&](int r, int c, int n) {
        const std::int64_t row = at.a_first + r, column = at.b_first + c;
        Vec16<Sum<T>> sums = laid<T>(laid_down, r, c);
        if (problem.kind == GroupedKind::hidden) {
            keep<T>(problem.up, row, column, n, sums);
            sums = activate<T>(problem.activation, sums);
        }
        char* const to = place_in<T>(out, expert, row, column);
        if (out.is_sum)
            store_neighbours<Sum<T>>(to, out.column_stride, n, sums.at);
        else
            store_neighbours<T>(to, out.column_stride, n, sums.at);
    });
}

template <class T>
FIVEDP_DEVICE void write_gated(const char* laid_down, const GroupedProblem& problem, const TileOrigin at) {
    for_laid<T, GemmTile<T>::size / 2>(at.a_count, at.b_count, [&](int r, int c, int n) {
        const std::int64_t row = at.a_first + r, column = at.b_first + c;
        const int turn = c / 8 * 16 + c % 8;
        const Vec16<Sum<T>> gate = laid<T>(laid_down, r, turn), up = laid<T>(laid_down, r, turn + 8);
        keep<T>(problem.gate, row, column, n, gate);
        keep<T>(problem.up, row, column, n, up);
        Vec16<Sum<T>> hidden = activate<T>(problem.activation, gate);
        FIVEDP_UNROLL
        for (int i = 0; i < Vec16<Sum<T>>::n; ++i)
            hidden.at[i] = rounded_product(hidden.at[i], to_float(from_float<T>(up.at[i])));
        keep<T>(problem.out, row, column, n, hidden);
    });
}

// Moves on by `steps` tiles; the expert is n_experts where there is none. Called by one thread.
template <class T>
FIVEDP_DEVICE void advance(GroupedTile& at, const GroupedProblem& problem, std::int64_t steps) {
    constexpr int size = GemmTile<T>::size;
    const bool outer = problem.kind == GroupedKind::outer;
    const int width = problem.gated ? size / 2 : size;
    const auto height = [&] { return ((outer ? problem.m : at.rows) + size - 1) / size; };
    at.number += steps;
    while (at.expert < 0 || at.number - at.before >= at.columns * height()) {
        if (at.expert >= 0) at.before += at.columns * height();
        if (++at.expert >= problem.n_experts) return;
        at.first_row = problem.offsets[at.expert];
        at.rows = problem.offsets[at.expert + 1] - at.first_row;
    }
    const std::int64_t row = (at.number - at.before) % height() * size;
    TileOrigin& origin = at.origin;
    origin.a_count = static_cast<int>(least((outer ? problem.m : at.rows) - row, size));
    origin.b_first = (at.number - at.before) / height() * width;
    origin.b_count = static_cast<int>(least(problem.n - origin.b_first, width));
    // The factors of an outer product are rows, which know no experts.
    origin.a_first = outer ? row : at.first_row + row;
    origin.k_first = outer ? at.first_row : 0;
    origin.b_batch = outer ? 0 : at.expert;
}

template <class T>
FIVEDP_KERNEL(gemm_threads, blocks_of_multiprocessor)
grouped_tiles(const GroupedProblem problem) {
    GroupedTile& at = *reinterpret_cast<GroupedTile*>(dynamic_shared() + GemmTile<T>::shared_bytes);
    if (thread() == 0) {
        const int width = problem.gated ? GemmTile<T>::size / 2 : GemmTile<T>::size;
        at = {block_x() - blocks_x(), (problem.n + width - 1) / width, 0, -1, 0, 0, {}};
    }
    for (;;) {
        if (thread() == 0) advance<T>(at, problem, blocks_x());
        sync_block();
        if (at.expert >= problem.n_experts) return;
        GroupedSource source{problem, at, at.origin};
        GemmSums<T> sums;
        sum_tile<T>(sums, source, dynamic_shared(), OpenSums<T>{nullptr});
        lay_down(sums, dynamic_shared());
        if (problem.gated)
            write_gated<T>(dynamic_shared(), problem, at.origin);
        else
            write_product<T>(dynamic_shared(), problem, at);
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
        launch(grouped_tiles<T>, tiles < at_once ? tiles : at_once, 1, 1, gemm_threads,
               GemmTile<T>::shared_bytes + sizeof(GroupedTile), stream, problem);
    });
}

}  // namespace fivedp
