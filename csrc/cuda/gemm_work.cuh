// The work of a product in the canonical order: which tile comes next, which flags it waits for, and what becomes of a
// finished sum.
//
// Blocks stay and take tiles in turns: of a batch, matrix by matrix; within it, 8 rows of tiles at a time, column by
// column, so that the blocks at work at one time read few panels of A and B, from the L2 cache.
#pragma once

#include "cuda/product_tile.cuh"

namespace fivedp {

constexpr int rows_at_a_time = 8;

// The tile that a block is at.
struct GemmPlace {
    std::int64_t number;
    TileOrigin origin;
};

// Copied `depth` of k at a time.
template <int depth>
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

    FIVEDP_DEVICE bool ends_with_arrays() const { return true; }
    FIVEDP_DEVICE bool waits() const { return problem.ready != nullptr; }

    // Before k .. of segment i is copied; `before` is what wait_for_flags is told.
    template <class... Before>
    FIVEDP_DEVICE void wait(int i, std::int64_t k, const Before&... before) {
        if (problem.ready == nullptr || problem.ready_along_m) return;
        const GemmSegment& segment = problem.segments[i];
        const std::int64_t end = k + depth < segment.k ? k + depth : segment.k;
        const std::int64_t last = (segment.first_k + end - 1) / problem.panel;
        if (last < arrived) return;
        wait_for_flags(problem.ready, arrived, last, before...);
        arrived = last + 1;
    }
};

// Before anything of a tile is copied; `before` as in GemmSource::wait.
template <class... Before>
FIVEDP_DEVICE void wait_for_rows(const GemmProblem& problem, const TileOrigin& at, const Before&... before) {
    if (problem.ready != nullptr && problem.ready_along_m)
        wait_for_flags(problem.ready, at.a_first / problem.panel, (at.a_first + at.a_count - 1) / problem.panel,
                       before...);
}

// Moves on by `steps` tiles of (rows, columns); nothing is left where the batch is then behind the last one.
template <int tile_rows, int tile_columns>
FIVEDP_DEVICE void advance(GemmPlace& at, const GemmProblem& problem, std::int64_t steps) {
    const std::int64_t rows = (problem.m + tile_rows - 1) / tile_rows;
    const std::int64_t columns = (problem.n + tile_columns - 1) / tile_columns;
    at.number += steps;
    const std::int64_t of_matrix = at.number % (rows * columns);
    const std::int64_t band = of_matrix / (rows_at_a_time * columns), of_band = of_matrix % (rows_at_a_time * columns);
    const std::int64_t height = least(rows - band * rows_at_a_time, rows_at_a_time);
    TileOrigin& origin = at.origin;
    origin.a_batch = origin.b_batch = at.number / (rows * columns);
    origin.a_first = (band * rows_at_a_time + of_band % height) * tile_rows;
    origin.b_first = of_band / height * tile_columns;
    origin.a_count = static_cast<int>(least(problem.m - origin.a_first, tile_rows));
    origin.b_count = static_cast<int>(least(problem.n - origin.b_first, tile_columns));
}

// alpha times n neighbours of a row of the tile, and beta times what is there, to C, whose elements are Out.
template <class T, class Out>
FIVEDP_DEVICE void store_scaled(const GemmProblem& problem, const TileOrigin& at, int row, int column, int n,
                                Vec16<Sum<T>> sum) {
    const GemmResult& c = problem.c;
    const Sum<T> alpha = static_cast<Sum<T>>(problem.alpha), beta = static_cast<Sum<T>>(problem.beta);
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
}

}  // namespace fivedp
