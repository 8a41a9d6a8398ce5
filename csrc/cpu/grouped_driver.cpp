#include "cpu/grouped_driver.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/thread_pool.hpp"
#include "cpu/block_queue.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/gemm_plan.hpp"

namespace fivedp {
namespace {

// Elements of a block of hidden: high and wide enough that packing is paid for, and its two products, 2 MB each in
// float32, are still in a shared cache when the activation reads them.
constexpr std::int64_t hidden_block_elements = 512 * 1024;

// Blocks a thread, at least: the last ones to be taken leave other threads idle for at most so small a part.
constexpr std::int64_t blocks_per_thread = 16;

// Below this many elements waking a second thread costs more than it saves.
constexpr double smallest_parallel_rows = 64 * 1024;

std::int64_t rows_of_group(const Groups& groups, std::int64_t group) {
    return groups.offsets[group + 1] - groups.offsets[group];
}

// A group's rows as a piece of A (rows are m) or, for products that sum over rows, with rows as k.
Piece rows_as_outer(const RowsPiece& x, std::int64_t first_row) {
    if (x.rows.table != nullptr) return {nullptr, x.k_begin, x.k_end, 0, x.column_stride, 0, x.rows.table + first_row};
    return {x.rows.data + first_row * x.rows.stride, x.k_begin, x.k_end, x.rows.stride, x.column_stride, 0};
}
Piece rows_as_k(const RowsPiece& x, std::int64_t first_row, std::int64_t rows) {
    if (x.rows.table != nullptr) return {nullptr, 0, rows, x.column_stride, 0, 0, x.rows.table + first_row};
    return {x.rows.data + first_row * x.rows.stride, 0, rows, x.column_stride, x.rows.stride, 0};
}

Piece weights_of(const WeightsPiece& w, std::int64_t expert) {
    return {w.data + expert * w.expert_stride, w.k_begin, w.k_end, w.n_stride, w.k_stride, 0};
}

// The products of one call and their blocks.
struct Products {
    const GemmKernel& kernel;
    std::vector<GemmRequest> requests;
    std::vector<std::int64_t> first_block;  // of each product, and the number of all
    int threads = 1;
    SharedTiles shared;

    Products(ElementType type, const SharedTiles& tiles) : kernel(gemm_kernel(type)), shared(tiles) {}

    // Chooses the blocks of all products. `most_elements` limits a block of C.
    void plan(std::int64_t most_elements) {
        double work = 0;
        std::int64_t streamed_columns = 0;
        for (const GemmRequest& request : requests) {
            work += work_of(request);
            if (can_stream(request, kernel)) streamed_columns += request.n;
        }
        threads = work < smallest_parallel_product ? 1 : thread_count();
        const int parts = shared.next != nullptr ? shared_parts : threads;
        first_block.assign(1, 0);
        for (GemmRequest& request : requests) {
            plan_blocks(request, kernel, can_stream(request, kernel) ? parts : 1, streamed_columns);
            const double share = parts > 1 ? work / (blocks_per_thread * parts) : work;
            const double elements = share / work_of(request) * static_cast<double>(request.m) * request.n;
            limit_blocks(request, kernel,
                         static_cast<std::int64_t>(std::min(elements, static_cast<double>(most_elements))));
            first_block.push_back(first_block.back() + count_blocks(request));
        }
    }

    // Multiply-adds, and something for the elements of C, which are what short sums cost.
    static double work_of(const GemmRequest& request) {
        return static_cast<double>(request.m) * request.n * (request.problem.k + 16);
    }

    std::int64_t scratch_bytes() const {
        std::int64_t bytes = 0;
        for (const GemmRequest& request : requests) bytes = std::max(bytes, block_bytes(request.problem, kernel));
        return bytes;
    }

    // Calls block(request index, range, memory, poll) for all blocks that nobody else takes; how many there are.
    template <class Block>
    std::int64_t run(std::int64_t bytes, const std::function<bool()>& progress, const Block& block) const {
        share_blocks(threads, first_block.back(), bytes, progress, shared,
                     [&](std::int64_t index, char* memory, const Poll& poll) {
                         const auto after = std::upper_bound(first_block.begin(), first_block.end(), index);
                         const std::size_t which = static_cast<std::size_t>(after - first_block.begin()) - 1;
                         return block(which, block_range(requests[which], index - first_block[which]), memory, poll);
                     });
        return first_block.back();
    }

    bool multiply(const GemmProblem& problem, const BlockRange& range, char* memory, const Poll& poll) const {
        return (problem.stream ? kernel.stream_block : kernel.block)(problem, range, memory, poll);
    }
};

GemmRequest request_of(ElementType type, std::int64_t m, std::int64_t n, std::int64_t k, const Operand& a,
                       const Operand& b, const ArrayView& c) {
    GemmRequest request{};
    request.type = type;
    request.m = m;
    request.n = n;
    request.problem.a = a;
    request.problem.b = b;
    request.problem.c = c;
    request.problem.k = k;
    request.problem.alpha = 1;
    request.problem.beta = 0;
    return request;
}

// The order of a sum: one chain of K blocks. Neither an expert's features nor its rows are cut over ranks in the middle
// of a sum, so no virtual shards are needed, and long chains cost least.
SumPlan one_shard(std::int64_t k, const GemmKernel& kernel) {
    const std::int64_t cuts[2] = {0, k};
    SumPlan plan;
    plan_sum(cuts, 1, kernel, plan);
    return plan;
}

// Calls work(begin, end) for runs of rows on all threads; how many runs there are.
template <class Work>
std::int64_t share_rows(std::int64_t rows, std::int64_t columns, const SharedTiles& tiles, const Work& work) {
    if (rows == 0) return 0;
    const int threads = static_cast<double>(rows) * columns < smallest_parallel_rows ? 1 : thread_count();
    const int parts = tiles.next != nullptr ? shared_parts : threads;
    const std::int64_t run = parts > 1 ? std::max<std::int64_t>(1, ceil_div(rows, 8 * parts)) : rows;
    share_blocks(threads, ceil_div(rows, run), 64, {}, tiles, [&](std::int64_t index, char*, const Poll&) {
        work(index * run, std::min((index + 1) * run, rows));
        return true;
    });
    return ceil_div(rows, run);
}

}  // namespace

std::int64_t run_grouped_matmul(const GroupedMatmulProblem& problem, const std::function<bool()>& progress,
                                const SharedTiles& tiles) {
    if (problem.n == 0) return 0;
    Products products(problem.type, tiles);
    const SumPlan sum = one_shard(problem.k, products.kernel);
    const std::int64_t n_x = static_cast<std::int64_t>(problem.x.size()),
                       n_w = static_cast<std::int64_t>(problem.w.size());
    std::vector<Piece> a, b;
    a.reserve(static_cast<std::size_t>(problem.groups.count * n_x));
    b.reserve(static_cast<std::size_t>(problem.groups.count * n_w));
    for (std::int64_t e = 0; e < problem.groups.count; ++e) {
        const std::int64_t first = problem.groups.offsets[e], rows = rows_of_group(problem.groups, e);
        if (rows == 0) continue;
        const Piece* const a_begin = a.data() + a.size();
        const Piece* const b_begin = b.data() + b.size();
        for (const RowsPiece& piece : problem.x) a.push_back(rows_as_outer(piece, first));
        for (const WeightsPiece& piece : problem.w) b.push_back(weights_of(piece, e));
        ArrayView c = problem.out;
        c.data += first * c.row_stride;
        c.rows = rows;
        products.requests.push_back(
            request_of(problem.type, rows, problem.n, problem.k, {a_begin, n_x}, {b_begin, n_w}, c));
        choose_orientation(products.requests.back(), products.kernel);
        set_sum(products.requests.back(), sum);
    }
    products.plan(INT64_MAX / 2);
    return products.run(products.scratch_bytes(), progress,
                        [&](std::size_t which, const BlockRange& range, char* memory, const Poll& poll) {
                            return products.multiply(products.requests[which].problem, range, memory, poll);
                        });
}

std::int64_t run_grouped_outer(const GroupedOuterProblem& problem, const std::function<bool()>& progress,
                               const SharedTiles& tiles) {
    if (problem.k == 0 || problem.n == 0) return 0;
    Products products(problem.type, tiles);
    const std::size_t count = static_cast<std::size_t>(problem.groups.count);
    std::vector<Piece> a(count), b(count);
    std::vector<SumPlan> sums;
    sums.reserve(count);
    for (std::size_t e = 0; e < count; ++e) {
        const std::int64_t group = static_cast<std::int64_t>(e), first = problem.groups.offsets[e],
                           rows = rows_of_group(problem.groups, group);
        a[e] = rows_as_k(problem.x, first, rows);
        b[e] = rows_as_k(problem.dy, first, rows);
        ArrayView c = problem.out;
        c.data += group * c.batch_stride;
        c.batch = 1;
        c.batch_stride = 0;
        // A group without rows has no pieces: its sum is that of no terms.
        const std::int64_t pieces = rows > 0 ? 1 : 0;
        products.requests.push_back(
            request_of(problem.type, problem.k, problem.n, rows, {&a[e], pieces}, {&b[e], pieces}, c));
        choose_orientation(products.requests.back(), products.kernel);
        sums.push_back(one_shard(rows, products.kernel));
        set_sum(products.requests.back(), sums.back());
    }
    products.plan(INT64_MAX / 2);
    return products.run(products.scratch_bytes(), progress,
                        [&](std::size_t which, const BlockRange& range, char* memory, const Poll& poll) {
                            return products.multiply(products.requests[which].problem, range, memory, poll);
                        });
}

namespace {

// A block's product goes to the kept array, or to `buffer` as if that were the part of C that the block covers.
RowsView send_product(GemmProblem& product, const RowsView& kept, std::int64_t first_row, const BlockRange& range,
                      std::int64_t size, char* buffer) {
    RowsView block{nullptr, 0, nullptr, kept.type};
    product.c.col_stride = size;
    if (kept.data != nullptr) {
        block.stride = kept.stride;
        block.data = kept.data + (first_row + range.m_begin) * kept.stride + range.n_begin * size;
    } else {
        block.stride = (range.n_end - range.n_begin) * size;
        block.data = buffer;
    }
    product.c.row_stride = block.stride;
    // C begins where element (0, 0) would lie.
    product.c.data = reinterpret_cast<char*>(reinterpret_cast<std::uintptr_t>(block.data) -
                                             static_cast<std::uintptr_t>(range.m_begin * block.stride) -
                                             static_cast<std::uintptr_t>(range.n_begin * size));
    return block;
}

}  // namespace

std::int64_t run_expert_hidden(const ExpertHiddenProblem& problem, const std::function<bool()>& progress,
                               const SharedTiles& tiles) {
    if (problem.n == 0) return 0;
    Products products(problem.type, tiles);
    const SumPlan sum = one_shard(problem.k, products.kernel);
    const bool gated = problem.w_gate.data != nullptr;
    const std::size_t count = static_cast<std::size_t>(problem.groups.count);
    const std::int64_t size = problem.type == ElementType::f64 ? 8 : problem.type == ElementType::f32 ? 4 : 2;
    std::vector<Piece> x(count), up(count), gate(count);
    std::vector<std::size_t> expert;
    for (std::size_t e = 0; e < count; ++e) {
        const std::int64_t group = static_cast<std::int64_t>(e), rows = rows_of_group(problem.groups, group);
        if (rows == 0) continue;
        x[e] = rows_as_outer(problem.x, problem.groups.offsets[e]);
        up[e] = weights_of(problem.w_up, group);
        if (gated) gate[e] = weights_of(problem.w_gate, group);
        const ArrayView c{nullptr, 1, rows, problem.n, 0, 0, size, problem.type};
        products.requests.push_back(request_of(problem.type, rows, problem.n, problem.k, {&x[e], 1}, {&up[e], 1}, c));
        set_sum(products.requests.back(), sum);
        expert.push_back(e);
    }
    products.plan(hidden_block_elements);

    std::int64_t block_size = 0;
    for (const GemmRequest& request : products.requests)
        block_size = std::max(block_size, request.problem.block_m * request.problem.block_n * size);
    const std::int64_t product_bytes = round_up(products.scratch_bytes(), 64), buffer_bytes = round_up(block_size, 64);
    const auto activate = kernels().experts.activate;
    return products.run(
        product_bytes + 2 * buffer_bytes, progress,
        [&](std::size_t which, const BlockRange& range, char* memory, const Poll& poll) {
            const std::size_t e = expert[which];
            const std::int64_t first_row = problem.groups.offsets[e];
            GemmProblem product = products.requests[which].problem;
            ActivationProblem block{problem.activation,         problem.type, {}, {}, problem.hidden,
                                    range.n_end - range.n_begin};
            if (gated) {
                product.b = {&gate[e], 1};
                block.gate = send_product(product, problem.gate, first_row, range, size, memory + product_bytes);
                if (!products.multiply(product, range, memory, poll)) return false;
            }
            product.b = {&up[e], 1};
            block.up = send_product(product, problem.up, first_row, range, size, memory + product_bytes + buffer_bytes);
            if (!products.multiply(product, range, memory, poll)) return false;
            block.hidden.data += (first_row + range.m_begin) * block.hidden.stride + range.n_begin * size;
            activate(block, 0, range.m_end - range.m_begin);
            return true;
        });
}

std::int64_t run_activation_gradient(const ActivationGradientProblem& problem, std::int64_t rows,
                                     const SharedTiles& tiles) {
    return share_rows(rows, 4 * problem.columns, tiles, [&](std::int64_t begin, std::int64_t end) {
        kernels().experts.activation_gradient(problem, begin, end);
    });
}

void run_combine(CombineProblem problem, std::int64_t outputs) {
    std::vector<std::uint8_t> joins(static_cast<std::size_t>(problem.starts[outputs]));
    problem.joins = joins.data();
    share_rows(outputs, problem.columns, {},
               [&](std::int64_t begin, std::int64_t end) { kernels().experts.combine(problem, begin, end); });
}

void run_weighted_rows(const WeightedRowsProblem& problem, std::int64_t rows) {
    share_rows(rows, problem.columns, {},
               [&](std::int64_t begin, std::int64_t end) { kernels().experts.weighted_rows(problem, begin, end); });
}

void run_row_dots(const RowDotsProblem& problem, std::int64_t rows) {
    share_rows(rows, problem.columns, {},
               [&](std::int64_t begin, std::int64_t end) { kernels().experts.row_dots(problem, begin, end); });
}

void run_gather_rows(const RowsView& from, const RowsView& to, std::int64_t rows, std::int64_t row_bytes) {
    share_rows(rows, row_bytes / 4, {}, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row)
            std::memcpy(to.data + row * to.stride,
                        from.table != nullptr ? from.table[row] : from.data + row * from.stride,
                        static_cast<std::size_t>(row_bytes));
    });
}

}  // namespace fivedp
