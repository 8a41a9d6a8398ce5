// The work of a product of rows grouped by expert: which tile comes next, and what becomes of finished sums.
//
// Blocks stay and take tiles (expert, columns, rows) in turns: each reads the offsets itself and walks through the
// experts once, so the host knows no sizes and waits for nothing.
#pragma once

#include "cuda/activations.cuh"
#include "cuda/product_tile.cuh"

namespace fivedp {

// Where a block is in the work list.
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
    FIVEDP_DEVICE bool ends_with_arrays() const { return problem.kind != GroupedKind::outer; }
    FIVEDP_DEVICE bool waits() const { return false; }
    FIVEDP_DEVICE const GemmOperand* second() const { return problem.gated ? &problem.up_weights : nullptr; }
    template <class... Before>
    FIVEDP_DEVICE void wait(int, std::int64_t, const Before&...) const {}
};

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

// n neighbours of a row of a tile of one product.
template <class T>
FIVEDP_DEVICE void store_product(const GroupedProblem& problem, const GroupedTile& tile, int r, int c, int n,
                                 Vec16<Sum<T>> sums) {
    const GemmResult& out = problem.out;
    const std::int64_t row = tile.origin.a_first + r, column = tile.origin.b_first + c;
    if (problem.kind == GroupedKind::hidden) {
        keep<T>(problem.up, row, column, n, sums);
        sums = activate<T>(problem.activation, sums);
    }
    char* const to = place_in<T>(out, problem.kind == GroupedKind::outer ? tile.expert : 0, row, column);
    if (out.is_sum)
        store_neighbours<Sum<T>>(to, out.column_stride, n, sums.at);
    else
        store_neighbours<T>(to, out.column_stride, n, sums.at);
}

// The same of gate and up.
template <class T>
FIVEDP_DEVICE void store_gated(const GroupedProblem& problem, const TileOrigin& at, int r, int c, int n,
                               const Vec16<Sum<T>>& gate, const Vec16<Sum<T>>& up) {
    const std::int64_t row = at.a_first + r, column = at.b_first + c;
    keep<T>(problem.gate, row, column, n, gate);
    keep<T>(problem.up, row, column, n, up);
    Vec16<Sum<T>> hidden = activate<T>(problem.activation, gate);
    FIVEDP_UNROLL
    for (int i = 0; i < Vec16<Sum<T>>::n; ++i)
        hidden.at[i] = rounded_product(hidden.at[i], to_float(from_float<T>(up.at[i])));
    keep<T>(problem.out, row, column, n, hidden);
}

// Before the first tile of a block, whose number is then its own less the number of blocks.
FIVEDP_DEVICE GroupedTile first_tile(const GroupedProblem& problem, int width) {
    return {block_x() - blocks_x(), (problem.n + width - 1) / width, 0, -1, 0, 0, {}};
}

// Moves on by `steps` tiles of (height, width); the expert is n_experts where there is none.
FIVEDP_DEVICE void advance(GroupedTile& at, const GroupedProblem& problem, int tile_height, int width,
                           std::int64_t steps) {
    const bool outer = problem.kind == GroupedKind::outer;
    const auto height = [&] { return ((outer ? problem.m : at.rows) + tile_height - 1) / tile_height; };
    at.number += steps;
    while (at.expert < 0 || at.number - at.before >= at.columns * height()) {
        if (at.expert >= 0) at.before += at.columns * height();
        if (++at.expert >= problem.n_experts) return;
        at.first_row = problem.offsets[at.expert];
        at.rows = problem.offsets[at.expert + 1] - at.first_row;
    }
    const std::int64_t row = (at.number - at.before) % height() * tile_height;
    TileOrigin& origin = at.origin;
    origin.a_count = static_cast<int>(least((outer ? problem.m : at.rows) - row, tile_height));
    origin.b_first = (at.number - at.before) / height() * width;
    origin.b_count = static_cast<int>(least(problem.n - origin.b_first, width));
    // The factors of an outer product are rows, which know no experts.
    origin.a_first = outer ? row : at.first_row + row;
    origin.k_first = outer ? at.first_row : 0;
    origin.b_batch = outer ? 0 : at.expert;
}

// Tiles of (height, width) that there are at most: each group has one row of tiles that is not full.
inline std::int64_t most_tiles(const GroupedProblem& problem, int height, int width) {
    const std::int64_t not_full = problem.n_experts < problem.n_rows ? problem.n_experts : problem.n_rows;
    const std::int64_t rows = problem.kind == GroupedKind::outer
                                  ? problem.n_experts * ((problem.m + height - 1) / height)
                                  : problem.n_rows / height + not_full;
    return rows * ((problem.n + width - 1) / width);
}

}  // namespace fivedp
