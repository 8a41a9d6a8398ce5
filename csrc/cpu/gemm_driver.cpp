#include "cpu/gemm_driver.hpp"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/thread_pool.hpp"
#include "cpu/block_queue.hpp"
#include "cpu/dispatch.hpp"

namespace fivedp {

void run_gemm(GemmRequest request, const std::function<bool()>& progress) {
    if (request.m == 0 || request.n == 0 || request.problem.c.batch == 0) return;
    const GemmKernel& kernel = gemm_kernel(request.type);
    choose_orientation(request, kernel);

    thread_local SumPlan sum_plan;  // kept: a small product does not allocate
    plan_sum(request.cuts, request.n_shards, kernel, sum_plan);
    set_sum(request, sum_plan);

    const GemmProblem& problem = request.problem;
    const double work = static_cast<double>(request.m) * request.n * (problem.k + 1) * problem.c.batch;
    const int threads = work < smallest_parallel_product ? 1 : thread_count();
    plan_blocks(request, kernel, threads, request.n * problem.c.batch);
    const auto block = problem.stream ? kernel.stream_block : kernel.block;
    share_blocks(threads, count_blocks(request), block_bytes(problem, kernel), progress, SharedTiles{},
                 [&](std::int64_t index, char* memory, const Poll& poll) {
                     return block(problem, block_range(request, index), memory, poll);
                 });
}

void run_tree_sum(const TreeSumProblem& problem) {
    const KernelTable& table = kernels();
    const std::int64_t rows = problem.out.batch * problem.out.rows;
    if (rows == 0 || problem.out.cols == 0) return;
    const double elements = static_cast<double>(rows) * problem.out.cols * problem.n_partials;
    const int threads = elements < 256 * 1024 ? 1 : thread_count();
    const std::int64_t run = std::max<std::int64_t>(1, std::min(ceil_div(rows, 4 * threads), rows));
    if (threads <= 1) return table.tree_sum(problem, 0, rows);
    std::atomic<std::int64_t> next{0};
    run_parallel(
        threads,
        [&](int) {
            for (std::int64_t begin; (begin = next.fetch_add(run)) < rows;)
                table.tree_sum(problem, begin, std::min(begin + run, rows));
        },
        [] {});
}

double run_multiply_adds(ElementType type, std::int64_t rounds) {
    const KernelTable& table = kernels();
    const auto loop = type == ElementType::f32   ? table.peak_f32
                      : type == ElementType::f64 ? table.peak_f64
                                                 : table.peak_bf16;
    const int threads = thread_count();
    if (threads <= 1) return loop(rounds);
    std::vector<double> done(static_cast<std::size_t>(threads));
    run_parallel(
        threads, [&](int thread) { done[static_cast<std::size_t>(thread)] = loop(rounds); }, [] {});
    return std::accumulate(done.begin(), done.end(), 0.0);
}

}  // namespace fivedp
