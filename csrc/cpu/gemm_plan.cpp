#include "cpu/gemm_plan.hpp"

#include <algorithm>
#include <cstdlib>

#include "cpu/dispatch.hpp"

namespace fivedp {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}
std::int64_t round_up(std::int64_t a, std::int64_t b) {
    return ceil_div(a, b) * b;
}

namespace {

// Scratch per thread, in elements of a sum: open sums, a round's panels of B and its strip of A.
constexpr std::int64_t scratch_elements = 2 * 1024 * 1024;
constexpr std::int64_t widest_block = 1024, highest_block = 1536;

// Bytes of a row of A or a column of B, packed for a round.
std::int64_t packed_row_bytes(const GemmProblem& problem, const GemmKernel& kernel) {
    return problem.most_passes * kernel.pass_units * kernel.unit_size;
}

// Bytes of a block besides its slots, and with them.
std::int64_t fixed_bytes(const GemmProblem& problem, const GemmKernel& kernel, std::int64_t block_m,
                         std::int64_t block_n) {
    const std::int64_t row_bytes = packed_row_bytes(problem, kernel);
    const std::int64_t strip = std::min(round_up(block_m, kernel.tile_m), problem.strip_rows);
    return ((1 + problem.n_tile_slots) * kernel.tile_m + problem.n_strip_slots * strip) * kernel.tile_n *
               kernel.accumulator_size +
           (round_up(block_n, kernel.tile_n) + strip) * row_bytes;
}
std::int64_t slot_bytes(const GemmKernel& kernel, std::int64_t block_m, std::int64_t block_n) {
    return round_up(block_m, kernel.tile_m) * round_up(block_n, kernel.tile_n) * kernel.accumulator_size;
}

}  // namespace

bool can_stream(const GemmRequest& request, const GemmKernel& kernel) {
    if (request.m > kernel.stream_rows || request.n < 4 * kernel.tile_n) return false;
    const std::int64_t size = request.type == ElementType::f64 ? 8 : request.type == ElementType::f32 ? 4 : 2;
    for (std::int64_t p = 0; p < request.problem.b.n_pieces; ++p)
        if (request.problem.b.pieces[p].outer_stride != size) return false;
    return true;
}

void plan_blocks(GemmRequest& request, const GemmKernel& kernel, int threads, std::int64_t columns_beside) {
    GemmProblem& problem = request.problem;
    const std::int64_t m = request.m, n = request.n, batch = problem.c.batch;
    const std::int64_t row_bytes = packed_row_bytes(problem, kernel);
    problem.strip_rows = std::max<std::int64_t>(kernel.strip_bytes / row_bytes / kernel.tile_m, 1) * kernel.tile_m;
    problem.stream = can_stream(request, kernel);
    if (problem.stream) {
        // A strip's sums in half of the L1 cache; several strips a thread, but none so short that B is read in bits.
        const std::int64_t fits = 16 * 1024 / (m * kernel.accumulator_size);
        const std::int64_t fair = threads > 1 ? std::max<std::int64_t>(ceil_div(columns_beside, 4 * threads), 256) : n;
        problem.block_m = m;
        problem.block_n = round_up(std::min({fits, fair, n}), kernel.tile_n);
        return;
    }
    // B's panels and the slots of a block as high as wide share the scratch.
    std::int64_t wide = widest_block, tall = 0;
    for (;; wide /= 2) {
        tall = (scratch_elements * kernel.accumulator_size - fixed_bytes(problem, kernel, highest_block, wide)) /
               (std::max(problem.n_slots, 1) * wide * kernel.accumulator_size);
        if (tall >= wide || wide <= 4 * kernel.tile_n) break;
    }
    tall = std::min(tall, highest_block) / kernel.tile_m * kernel.tile_m;
    std::int64_t blocks_m = ceil_div(m, tall), blocks_n = ceil_div(n, wide);
    // Deal evenly: cut on until the threads get equally many blocks, or so many that it matters little.
    const auto uneven = [&] { return batch * blocks_m * blocks_n % threads != 0; };
    while (threads > 1 && uneven() && batch * blocks_m * blocks_n < 4 * threads) {
        const bool cut_m = ceil_div(m, blocks_m) >= ceil_div(n, blocks_n);
        if (cut_m && ceil_div(m, blocks_m + 1) >= kernel.tile_m)
            ++blocks_m;
        else if (ceil_div(n, blocks_n + 1) >= kernel.tile_n)
            ++blocks_n;
        else
            break;
    }
    problem.block_m = round_up(ceil_div(m, blocks_m), kernel.tile_m);
    problem.block_n = round_up(ceil_div(n, blocks_n), kernel.tile_n);
}

void limit_blocks(GemmRequest& request, const GemmKernel& kernel, std::int64_t elements) {
    GemmProblem& problem = request.problem;
    if (problem.stream) return;
    // Rows and columns that packing pays for: a packed row of A serves all columns of its block, a panel of B all rows.
    const std::int64_t fewest_rows = 9 * kernel.tile_m, fewest_columns = 8 * kernel.tile_n;
    std::int64_t parts_m = ceil_div(request.m, problem.block_m), parts_n = ceil_div(request.n, problem.block_n);
    for (;;) {
        const std::int64_t rows = ceil_div(request.m, parts_m), columns = ceil_div(request.n, parts_n);
        if (rows * columns <= elements) break;
        const bool can_cut_m = rows >= 2 * fewest_rows, can_cut_n = columns >= 2 * fewest_columns;
        if (can_cut_n && (columns >= 2 * rows || !can_cut_m))
            ++parts_n;
        else if (can_cut_m)
            ++parts_m;
        else
            break;
    }
    problem.block_m = round_up(ceil_div(request.m, parts_m), kernel.tile_m);
    problem.block_n = round_up(ceil_div(request.n, parts_n), kernel.tile_n);
}

std::int64_t block_bytes(const GemmProblem& problem, const GemmKernel& kernel) {
    if (problem.stream)
        return (1 + problem.n_tile_slots + problem.n_strip_slots + problem.n_slots) * problem.block_m *
                   problem.block_n * kernel.accumulator_size +
               problem.block_m * kernel.pass_units * kernel.unit_size;
    return fixed_bytes(problem, kernel, problem.block_m, problem.block_n) +
           problem.n_slots * slot_bytes(kernel, problem.block_m, problem.block_n);
}

std::int64_t count_blocks(const GemmRequest& request) {
    const GemmProblem& problem = request.problem;
    return ceil_div(request.m, problem.block_m) * ceil_div(request.n, problem.block_n) * problem.c.batch;
}

BlockRange block_range(const GemmRequest& request, std::int64_t index) {
    const GemmProblem& problem = request.problem;
    const std::int64_t blocks_n = ceil_div(request.n, problem.block_n);
    const std::int64_t in_batch = ceil_div(request.m, problem.block_m) * blocks_n;
    BlockRange range;
    range.batch = index / in_batch;
    range.m_begin = index % in_batch / blocks_n * problem.block_m;
    range.m_end = std::min(range.m_begin + problem.block_m, request.m);
    range.n_begin = index % in_batch % blocks_n * problem.block_n;
    range.n_end = std::min(range.n_begin + problem.block_n, request.n);
    return range;
}

namespace {

// The same product transposed: C^T = B^T A^T. Each element is the same chain of the same products.
void transpose(GemmRequest& request) {
    GemmProblem& problem = request.problem;
    std::swap(request.m, request.n);
    std::swap(problem.a, problem.b);
    std::swap(problem.c.rows, problem.c.cols);
    std::swap(problem.c.row_stride, problem.c.col_stride);
}

}  // namespace

const GemmKernel& gemm_kernel(ElementType type) {
    const KernelTable& table = kernels();
    return type == ElementType::f32 ? table.f32 : type == ElementType::f64 ? table.f64 : table.bf16;
}

void choose_orientation(GemmRequest& request, const GemmKernel& kernel) {
    // Tiles are wide and low, and C is best written along its rows.
    const ArrayView& view = request.problem.c;
    const bool column_major = std::abs(view.row_stride) < std::abs(view.col_stride) && request.m > 1 && request.n > 1;
    const bool narrow = request.n < kernel.tile_n && request.m > request.n;
    if ((column_major && request.m >= kernel.tile_n) || narrow) transpose(request);
}

void set_sum(GemmRequest& request, const SumPlan& plan) {
    request.problem.rounds = plan.rounds.data();
    request.problem.n_rounds = static_cast<std::int64_t>(plan.rounds.size());
    request.problem.most_passes = plan.most_passes;
    request.problem.n_slots = plan.n_slots;
    request.problem.n_strip_slots = plan.n_strip_slots;
    request.problem.n_tile_slots = plan.n_tile_slots;
}

}  // namespace fivedp
