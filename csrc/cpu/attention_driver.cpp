#include "cpu/attention_driver.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "common/thread_pool.hpp"
#include "cpu/block_queue.hpp"
#include "cpu/dispatch.hpp"

namespace fivedp {
namespace {

// Below this many visible pairs times heads waking a second thread costs more than it saves.
constexpr double smallest_parallel_pairs = 64 * 1024, smallest_parallel_elements = 256 * 1024;

const AttentionKernel& kernel_of(const AttentionProblem& problem) {
    const KernelTable& table = kernels();
    return problem.type == ElementType::f64    ? table.attention_f64
           : problem.type == ElementType::bf16 ? table.attention_bf16
                                               : table.attention_f32;
}

// Queries of a range: about as many ranges as `limit` query rows each ask for, of equal size, each beginning at a whole
// tile of query rows.
std::int64_t queries_per_range(const AttentionProblem& problem, std::int64_t limit) {
    const std::int64_t group = problem.heads / problem.kv_heads, rows = problem.n_queries * group;
    const std::int64_t parts = std::max<std::int64_t>(1, (rows + limit - 1) / limit);
    const std::int64_t step = query_tile / std::gcd(query_tile, group);
    const std::int64_t queries = (problem.n_queries + parts - 1) / parts;
    return std::max<std::int64_t>(1, (queries + step - 1) / step) * step;
}

// Ranges of `queries` each, dealt out over batch and key heads.
std::vector<AttentionRange> ranges_of(const AttentionProblem& problem, std::int64_t queries) {
    std::vector<AttentionRange> ranges;
    // The last queries first: under a causal mask they have most to do.
    for (std::int64_t begin = (problem.n_queries - 1) / queries * queries; begin >= 0; begin -= queries)
        for (std::int64_t batch = 0; batch < problem.batch; ++batch)
            for (std::int64_t head = 0; head < problem.kv_heads; ++head)
                ranges.push_back({batch, head, begin, std::min(begin + queries, problem.n_queries)});
    return ranges;
}

template <class Work>
void on_threads(int threads, std::int64_t n, std::int64_t bytes, const Work& work) {
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
    const auto run = [&](int) {
        char* memory = nullptr;
        try {
            memory = scratch(bytes);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
            return;
        }
        for (std::int64_t index; (index = next.fetch_add(1)) < n;) work(index, memory);
    };
    if (threads <= 1 || n <= 1)
        run(0);
    else
        run_parallel(static_cast<int>(std::min<std::int64_t>(threads, n)), run, [] {});
    if (out_of_memory) throw std::bad_alloc();
}

int threads_for(const AttentionProblem& problem) {
    double pairs = 0;
    for (const AttentionProblem* part = &problem; part != nullptr; part = part->next)
        pairs += static_cast<double>(part->n_queries) * part->n_keys * part->batch * part->heads;
    return pairs < smallest_parallel_pairs ? 1 : thread_count();
}

float widen(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T, class Stored>
T read(const char* from) {
    Stored value;
    std::memcpy(&value, from, sizeof value);
    if constexpr (sizeof(Stored) == 2)
        return static_cast<T>(widen(value));
    else
        return value;
}

template <class T, class Stored>
void write(char* to, T value) {
    Stored stored;
    if constexpr (sizeof(Stored) == 2)
        stored = to_bf16(value);
    else
        stored = value;
    std::memcpy(to, &stored, sizeof stored);
}

char* row_of(const TokenView& view, std::int64_t batch, std::int64_t token, std::int64_t head) {
    return view.data + batch * view.batch_stride + token * view.token_stride + head * view.head_stride;
}

// Calls row(batch, query, head, flat) for every row of the state, in the order of memory: heads lie within tokens.
template <class Row>
void each_row(const AttentionProblem& problem, const Row& row) {
    constexpr std::int64_t queries_per_slice = 64;
    const std::int64_t slices = (problem.n_queries + queries_per_slice - 1) / queries_per_slice;
    const auto slice = [&](std::int64_t index, char*) {
        const std::int64_t batch = index / slices, begin = index % slices * queries_per_slice;
        for (std::int64_t query = begin; query < std::min(begin + queries_per_slice, problem.n_queries); ++query)
            for (std::int64_t head = 0; head < problem.heads; ++head)
                row(batch, query, head, (batch * problem.heads + head) * problem.n_queries + query);
    };
    const double elements = static_cast<double>(problem.n_queries) * problem.v_size * problem.batch * problem.heads;
    on_threads(elements < smallest_parallel_elements ? 1 : thread_count(), problem.batch * slices, 64, slice);
}

template <class T, class Stored>
void finish(const AttentionProblem& problem, const TokenView& output, T* log_sum) {
    const T* const highest = static_cast<const T*>(problem.highest);
    const T* const total = static_cast<const T*>(problem.total);
    const T* const sums = static_cast<const T*>(problem.output);
    const T log2 = static_cast<T>(0.69314718055994530942);
    each_row(problem, [&](std::int64_t batch, std::int64_t query, std::int64_t head, std::int64_t flat) {
        const T* const from = sums + ((batch * problem.n_queries + query) * problem.heads + head) * problem.v_size;
        char* const to = row_of(output, batch, query, head);
        const bool seen = !(total[flat] == 0 && highest[flat] == -std::numeric_limits<T>::infinity());
        log_sum[flat] = seen ? highest[flat] * log2 + std::log(total[flat]) : -std::numeric_limits<T>::infinity();
        const T divisor = seen ? total[flat] : T(1);  // the sums of a row that has seen no key are 0
        for (std::int64_t i = 0; i < problem.v_size; ++i)
            write<T, Stored>(to + i * (std::int64_t)sizeof(Stored), from[i] / divisor);
    });
}

template <class T, class Stored>
void delta_of(const AttentionProblem& problem, const TokenView& output, T* delta) {
    constexpr std::int64_t step = sizeof(Stored);
    each_row(problem, [&](std::int64_t batch, std::int64_t query, std::int64_t head, std::int64_t flat) {
        const char* const out = row_of(output, batch, query, head);
        const char* const d_out = row_of(problem.d_out, batch, query, head);
        T sum = 0;
        for (std::int64_t i = 0; i < problem.v_size; ++i)
            sum += read<T, Stored>(out + i * step) * read<T, Stored>(d_out + i * step);
        delta[flat] = sum;
    });
}

}  // namespace

void run_attention_forward(const AttentionProblem& problem) {
    const AttentionKernel& kernel = kernel_of(problem);
    const std::int64_t group = problem.heads / problem.kv_heads;
    const int threads = threads_for(problem);
    std::int64_t rows = kernel.forward_rows;
    const auto ranges_with = [&] { return ranges_of(problem, queries_per_range(problem, rows)); };
    // Enough ranges for all threads, but none of so few rows that packing the keys outweighs using them.
    while (threads > 1 && rows > 128 && static_cast<int>(ranges_with().size()) < 4 * threads) rows /= 2;
    const std::vector<AttentionRange> ranges = ranges_with();
    const std::int64_t bytes = kernel.forward_bytes(problem, group * queries_per_range(problem, rows));
    on_threads(threads, static_cast<std::int64_t>(ranges.size()), bytes, [&](std::int64_t index, char* memory) {
        kernel.forward(problem, ranges[static_cast<std::size_t>(index)], memory);
    });
}

void run_attention_backward(const AttentionProblem& problem) {
    const AttentionKernel& kernel = kernel_of(problem);
    const std::int64_t group = problem.heads / problem.kv_heads;
    const AttentionProblem* longest = &problem;
    for (const AttentionProblem* part = &problem; part != nullptr; part = part->next)
        if (part->n_queries > longest->n_queries) longest = part;
    const std::int64_t queries = queries_per_range(*longest, kernel.backward_rows);
    // One thread a key head: d_k and d_v are sums over queries in rising order.
    on_threads(threads_for(problem), problem.batch * problem.kv_heads, kernel.backward_bytes(*longest, group * queries),
               [&](std::int64_t index, char* memory) {
                   kernel.backward(problem, index / problem.kv_heads, index % problem.kv_heads, queries, memory);
               });
}

void finish_attention(const AttentionProblem& problem, const TokenView& output, void* log_sum) {
    if (problem.type == ElementType::f64)
        finish<double, double>(problem, output, static_cast<double*>(log_sum));
    else if (problem.type == ElementType::f32)
        finish<float, float>(problem, output, static_cast<float*>(log_sum));
    else
        finish<float, std::uint16_t>(problem, output, static_cast<float*>(log_sum));
}

void attention_delta(const AttentionProblem& problem, const TokenView& output, void* delta) {
    if (problem.type == ElementType::f64)
        delta_of<double, double>(problem, output, static_cast<double*>(delta));
    else if (problem.type == ElementType::f32)
        delta_of<float, float>(problem, output, static_cast<float*>(delta));
    else
        delta_of<float, std::uint16_t>(problem, output, static_cast<float*>(delta));
}

}  // namespace fivedp
