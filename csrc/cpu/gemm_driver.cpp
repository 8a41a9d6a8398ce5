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

namespace fivedp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto progress_interval = std::chrono::microseconds(1500);

// Below this many multiply-adds waking a second thread costs more than it saves.
constexpr double smallest_parallel_product = 1 << 20;

// Bytes of scratch per thread: open sums, one K block of B's panels and one strip of A.
constexpr std::int64_t scratch_limit = 5 * 1024 * 1024;

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

std::int64_t scratch_bytes(const GemmProblem& problem, const GemmKernel& kernel) {
    const std::int64_t block_m = round_up(problem.block_m, kernel.tile_m),
                       block_n = round_up(problem.block_n, kernel.tile_n);
    const std::int64_t strip = std::min<std::int64_t>(block_m * kernel.units_per_block * kernel.unit_size, 256 * 1024);
    return problem.n_slots * block_m * block_n * kernel.accumulator_size +
           block_n * kernel.units_per_block * kernel.unit_size + strip;
}

int count_ones(std::int64_t value) {
    int ones = 0;
    for (; value != 0; value &= value - 1) ++ones;
    return ones;
}

// Levels of scratch that the binary counter over these shards can need (see cpu/gemm.hpp).
int slots(const GemmProblem& problem) {
    int needed = 0;
    for (std::int64_t shard = 0; shard < problem.n_shards; ++shard) {
        const bool kept_open = problem.cuts[shard + 1] - problem.cuts[shard] > k_block;
        const bool stored = shard + 1 < problem.n_shards;
        needed = std::max(needed, count_ones(shard) + (kept_open ? 1 : 0));
        if (stored) needed = std::max(needed, count_ones(shard + 1));
    }
    return needed;
}

// Sizes of a C block: as large as the scratch allows, even, and a few per thread.
void plan(GemmRequest& request, const GemmKernel& kernel, int threads) {
    GemmProblem& problem = request.problem;
    problem.n_slots = slots(problem);
    problem.stream = false;
    const std::int64_t m = request.m, n = request.n;
    std::int64_t wide = 1024;
    const std::int64_t fixed = 256 * 1024;
    std::int64_t tall = 0;
    for (;; wide /= 2) {
        const std::int64_t panels = wide * kernel.units_per_block * kernel.unit_size;
        tall = (scratch_limit - fixed - panels) / (std::max(problem.n_slots, 1) * wide * kernel.accumulator_size);
        if (tall >= wide / 2 || wide <= 64) break;
    }
    tall = std::clamp<std::int64_t>(tall / kernel.tile_m * kernel.tile_m, kernel.tile_m,
                                    1024 / kernel.tile_m * kernel.tile_m);
    std::int64_t blocks_m = ceil_div(m, tall), blocks_n = ceil_div(n, wide);
    if (threads > 1) {
        const std::int64_t wanted = threads;
        while (problem.c.batch * blocks_m * blocks_n % wanted != 0 &&
               problem.c.batch * blocks_m * blocks_n < 4 * wanted) {
            if (ceil_div(m, blocks_m) >= ceil_div(n, blocks_n) && ceil_div(m, blocks_m + 1) >= kernel.tile_m)
                ++blocks_m;
            else if (ceil_div(n, blocks_n + 1) >= kernel.tile_n)
                ++blocks_n;
            else
                break;
        }
    }
    problem.block_m = round_up(ceil_div(m, blocks_m), kernel.tile_m);
    problem.block_n = round_up(ceil_div(n, blocks_n), kernel.tile_n);
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

    const GemmProblem& problem = request.problem;
    const double work = static_cast<double>(request.m) * request.n * (problem.k + 1) * problem.c.batch;
    const int threads = work < smallest_parallel_product ? 1 : thread_count();
    plan(request, kernel, threads);
    const std::int64_t blocks_m = ceil_div(request.m, problem.block_m), blocks_n = ceil_div(request.n, problem.block_n);
    const std::int64_t n_blocks = blocks_m * blocks_n * problem.c.batch;
    const std::int64_t bytes = scratch_bytes(problem, kernel);

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
            if (!kernel.block(problem, range, memory, poll)) return;
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
