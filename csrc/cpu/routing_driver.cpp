#include "cpu/routing_driver.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "common/thread_pool.hpp"
#include "cpu/dispatch.hpp"

namespace fivedp {
namespace {

constexpr std::int64_t rows_at_a_time = 64;
// Below this many logits waking a second thread costs more than it saves.
constexpr std::int64_t smallest_parallel_logits = 64 * 1024;

struct FreeScratch {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<char, FreeScratch>;

const RoutingKernel& kernel_of(const RoutingProblem& problem) {
    return problem.type == ElementType::f64 ? kernels().routing_f64 : kernels().routing_f32;
}

// Calls work(worker, row_begin, row_end, scratch) until all rows are done, on at most workers.size() threads, each of
// which has its own place in `workers`.
template <class Worker, class Work>
void on_threads(const RoutingProblem& problem, std::vector<Worker>& workers, const Work& work) {
    const std::size_t bytes = static_cast<std::size_t>(kernel_of(problem).scratch_bytes(problem));
    std::vector<Scratch> scratch;
    for (std::size_t i = 0; i < workers.size(); ++i)
        scratch.emplace_back(static_cast<char*>(::operator new(bytes, std::align_val_t(64))));
    std::atomic<std::int64_t> next{0};
    const auto run = [&](int worker) {
        const auto place = static_cast<std::size_t>(worker);
        for (std::int64_t begin; (begin = next.fetch_add(rows_at_a_time)) < problem.tokens;)
            work(workers[place], begin, std::min(begin + rows_at_a_time, problem.tokens), scratch[place].get());
    };
    run_parallel(static_cast<int>(workers.size()), run, [] {});
}

std::size_t threads_for(const RoutingProblem& problem) {
    if (problem.tokens * problem.experts < smallest_parallel_logits) return 1;
    const std::int64_t chunks = (problem.tokens + rows_at_a_time - 1) / rows_at_a_time;
    return static_cast<std::size_t>(std::max<std::int64_t>(1, std::min<std::int64_t>(thread_count(), chunks)));
}

struct ThreadSums {
    std::vector<std::int64_t> choices, probabilities;
    RoutingSums sums;
};

}  // namespace

RoutingTotals run_routing_forward(const RoutingProblem& problem, std::int64_t* choices, std::int64_t* probabilities) {
    const RoutingKernel& kernel = kernel_of(problem);
    const std::int64_t pairs = problem.top_k * problem.experts;
    std::vector<ThreadSums> threads(threads_for(problem));
    for (ThreadSums& thread : threads) {
        thread.choices.assign(static_cast<std::size_t>(pairs), 0);
        thread.probabilities.assign(static_cast<std::size_t>(problem.experts + kernel.lanes), 0);
        thread.sums = {thread.choices.data(), thread.probabilities.data(), 0, 0, 0, -1};
    }
    on_threads(problem, threads, [&](ThreadSums& thread, std::int64_t begin, std::int64_t end, char* scratch) {
        // Later rows of a thread that has met an invalid one are of no interest.
        if (thread.sums.first_invalid < 0) kernel.forward(problem, begin, end, thread.sums, scratch);
    });
    RoutingTotals totals{0, 0, 0, -1};
    std::fill_n(choices, pairs, 0);
    std::fill_n(probabilities, problem.experts, 0);
    for (const ThreadSums& thread : threads) {
        for (std::int64_t i = 0; i < pairs; ++i) choices[i] += thread.sums.choices[i];
        for (std::int64_t i = 0; i < problem.experts; ++i) probabilities[i] += thread.sums.probabilities[i];
        totals.square_whole += thread.sums.square_whole;
        totals.square_fraction += thread.sums.square_fraction;
        totals.beyond += thread.sums.beyond;
        const std::int64_t invalid = thread.sums.first_invalid;
        if (invalid >= 0 && (totals.first_invalid < 0 || invalid < totals.first_invalid))
            totals.first_invalid = invalid;
    }
    return totals;
}

void run_routing_backward(const RoutingProblem& problem) {
    const RoutingKernel& kernel = kernel_of(problem);
    std::vector<char> threads(threads_for(problem));
    on_threads(problem, threads, [&](char&, std::int64_t begin, std::int64_t end, char* scratch) {
        kernel.backward(problem, begin, end, scratch);
    });
}

void drop_by_position(const std::int32_t* chosen, std::int64_t tokens, std::int64_t top_k, std::int64_t experts,
                      std::int64_t capacity, std::int64_t* before, std::int32_t* kept) {
    for (std::int64_t pair = 0; pair < tokens * top_k; ++pair) {
        const std::int32_t expert = chosen[pair];
        kept[pair] = expert >= 0 && before[pair % top_k * experts + expert]++ < capacity ? expert : -1;
    }
}

}  // namespace fivedp
