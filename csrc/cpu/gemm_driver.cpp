#include "cpu/gemm_driver.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/check.hpp"
#include "common/thread_pool.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/sum_plan.hpp"

namespace fivedp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto progress_interval = std::chrono::microseconds(1500);

// Below this many multiply-adds waking a second thread costs more than it saves.
constexpr double smallest_parallel_product = 1 << 20;

// Bytes of scratch per thread: open sums, one K block of B's panels and one strip of A.
constexpr std::int64_t scratch_limit = 8 * 1024 * 1024;
constexpr std::int64_t widest_block = 1024, highest_block = 1536;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
    return (a + b - 1) / b;
}
std::int64_t round_up(std::int64_t a, std::int64_t b) {
    return ceil_div(a, b) * b;
}

// Scratch is kept between calls, one buffer a thread.
char* scratch(std::int64_t bytes) {
    struct Free {
        void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    thread_local std::unique_ptr<char, Free> buffer;
    thread_local std::int64_t size = 0;
    if (size < bytes) {
        buffer.reset();
        buffer.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
        size = bytes;
    }
    return buffer.get();
}

// Bytes of a block besides its slots, and with them.
std::int64_t fixed_bytes(const GemmProblem& problem, const GemmKernel& kernel, std::int64_t block_m,
                         std::int64_t block_n) {
    const std::int64_t panel_bytes = kernel.pass_units * kernel.unit_size;
    return (1 + problem.n_local_slots) * kernel.tile_m * kernel.tile_n * kernel.accumulator_size +
           round_up(block_n, kernel.tile_n) * panel_bytes +
           std::min(round_up(block_m, kernel.tile_m), kernel.strip_rows) * panel_bytes;
}
std::int64_t slot_bytes(const GemmKernel& kernel, std::int64_t block_m, std::int64_t block_n) {
    return round_up(block_m, kernel.tile_m) * round_up(block_n, kernel.tile_n) * kernel.accumulator_size;
}

// Few rows, and every piece of B contiguous along n.
bool can_stream(const GemmRequest& request, const GemmKernel& kernel) {
    if (request.m > kernel.stream_rows || request.n < 4 * kernel.tile_n) return false;
    const std::int64_t size = request.type == ElementType::f64 ? 8 : request.type == ElementType::f32 ? 4 : 2;
    for (std::int64_t p = 0; p < request.problem.b.n_pieces; ++p)
        if (request.problem.b.pieces[p].outer_stride != size) return false;
    return true;
}

// Sizes of a C block, and the bytes of scratch that one needs.
std::int64_t plan_blocks(GemmRequest& request, const GemmKernel& kernel, int threads) {
    GemmProblem& problem = request.problem;
    const std::int64_t m = request.m, n = request.n, batch = problem.c.batch;
    problem.stream = can_stream(request, kernel);
    if (problem.stream) {
        // A strip's sums in half of the L1 cache; several strips a thread, but none so short that B is read in bits.
        const std::int64_t fits = 16 * 1024 / (m * kernel.accumulator_size);
        const std::int64_t fair = threads > 1 ? std::max<std::int64_t>(ceil_div(n * batch, 4 * threads), 256) : n;
        problem.block_m = m;
        problem.block_n = round_up(std::min({fits, fair, n}), kernel.tile_n);
        return (1 + problem.n_local_slots + problem.n_slots) * m * problem.block_n * kernel.accumulator_size +
               m * kernel.pass_units * kernel.unit_size;
    }
    // B's panels and the slots of a block as high as wide share the scratch.
    std::int64_t wide = widest_block, tall = 0;
    for (;; wide /= 2) {
        tall = (scratch_limit - fixed_bytes(problem, kernel, highest_block, wide)) /
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
    return fixed_bytes(problem, kernel, problem.block_m, problem.block_n) +
           problem.n_slots * slot_bytes(kernel, problem.block_m, problem.block_n);
}

// The same product transposed: C^T = B^T A^T. Each element is the same chain of the same products.
void transpose(GemmRequest& request) {
    GemmProblem& problem = request.problem;
    std::swap(request.m, request.n);
    std::swap(problem.a, problem.b);
    std::swap(problem.c.rows, problem.c.cols);
    std::swap(problem.c.row_stride, problem.c.col_stride);
}

}  // namespace

void run_gemm(GemmRequest request, const std::function<bool()>& progress) {
    if (request.m == 0 || request.n == 0 || request.problem.c.batch == 0) return;
    const KernelTable& table = kernels();
    const GemmKernel& kernel = request.type == ElementType::f32   ? table.f32
                               : request.type == ElementType::f64 ? table.f64
                                                                  : table.bf16;
    // Tiles are wide and low, and C is best written along its rows.
    const ArrayView& view = request.problem.c;
    const bool column_major = std::abs(view.row_stride) < std::abs(view.col_stride) && request.m > 1 && request.n > 1;
    const bool narrow = request.n < kernel.tile_n && request.m > request.n;
    if ((column_major && request.m >= kernel.tile_n) || narrow) transpose(request);

    thread_local SumPlan sum_plan;  // kept: a small product does not allocate
    plan_sum(request.cuts, request.n_shards, kernel.unit_k, kernel.pass_units, sum_plan);
    request.problem.passes = sum_plan.passes.data();
    request.problem.n_passes = static_cast<std::int64_t>(sum_plan.passes.size());
    request.problem.n_slots = sum_plan.n_slots;
    request.problem.n_local_slots = sum_plan.n_local_slots;

    const GemmProblem& problem = request.problem;
    const double work = static_cast<double>(request.m) * request.n * (problem.k + 1) * problem.c.batch;
    const int threads = work < smallest_parallel_product ? 1 : thread_count();
    const std::int64_t bytes = plan_blocks(request, kernel, threads);
    const std::int64_t blocks_m = ceil_div(request.m, problem.block_m), blocks_n = ceil_div(request.n, problem.block_n);
    const std::int64_t n_blocks = blocks_m * blocks_n * problem.c.batch;

    std::atomic<std::int64_t> next{0};
    std::atomic<bool> stop{false}, out_of_memory{false};
    struct Caller {
        const std::function<bool()>& progress;
        std::atomic<bool>& stop;
        Clock::time_point due;
    } caller{progress, stop, Clock::now() + progress_interval};
    const auto ask_caller = [](void* context) {
        Caller& me = *static_cast<Caller*>(context);
        if (me.stop.load(std::memory_order_relaxed)) return false;
        if (me.progress && Clock::now() >= me.due) {
            if (!me.progress()) {
                me.stop = true;
                return false;
            }
            me.due = Clock::now() + progress_interval;
        }
        return true;
    };
    const auto ask_stop = [](void* context) {
        return !static_cast<Caller*>(context)->stop.load(std::memory_order_relaxed);
    };
    const auto work_on_blocks = [&](int worker) {
        const Poll poll = worker == 0 ? Poll{ask_caller, &caller} : Poll{ask_stop, &caller};
        char* memory = nullptr;
        try {
            memory = scratch(bytes);
        } catch (const std::bad_alloc&) {
            stop = out_of_memory = true;
            return;
        }
        for (std::int64_t index; !stop && (index = next.fetch_add(1)) < n_blocks;) {
            BlockRange range;
            range.batch = index / (blocks_m * blocks_n);
            const std::int64_t in_batch = index % (blocks_m * blocks_n);
            range.m_begin = in_batch / blocks_n * problem.block_m;
            range.m_end = std::min(range.m_begin + problem.block_m, request.m);
            range.n_begin = in_batch % blocks_n * problem.block_n;
            range.n_end = std::min(range.n_begin + problem.block_n, request.n);
            if (!(problem.stream ? kernel.stream_block : kernel.block)(problem, range, memory, poll)) return;
        }
    };
    if (threads <= 1 || n_blocks == 1) {
        work_on_blocks(0);
    } else {
        run_parallel(static_cast<int>(std::min<std::int64_t>(threads, n_blocks)), work_on_blocks,
                     [&] { ask_caller(&caller); });
    }
    if (out_of_memory) throw std::bad_alloc();
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

}  // namespace fivedp
