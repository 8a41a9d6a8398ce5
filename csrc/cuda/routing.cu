// Routing of tokens to experts: scores, the k best, their weights, and the sums that the losses need.
//
// A warp has a token, its logits in registers (4, 8 or 32 a lane: up to 128, 256 or 1024 experts). The k best are taken
// one after the other: numbers become unsigned ones of the same order, a warp-wide maximum finds the highest, a minimum
// the lowest expert that has it. Scores, weights and sums have the bits of the CPU (routing_row.cuh), so the whole
// numbers below are the same as well.
//
// Shared memory, for each of the 4 warps: a row of scores, from which lane s takes that of slot s, and a row of XX stay
// for many tokens and add what they have to the totals at their end: sums of whole numbers, so no order matters.
//
// Bytes: a logit is read once (scores written once where they are wanted), 8 bytes a pair are written. About 60
// instructions a logit and 5 E / 32 a pair: at T = 32768, E = 128, k = 8 in float32, 17 MB read and 2 MB written are
// 4 us of an H200's 4.8 TB/s, the instructions about twice that.
#include "cuda/routing_row.cuh"

namespace fivedp {
namespace {

constexpr int routing_warps = 4;
// What a block of any chip can have.
constexpr std::int64_t most_shared_bytes = 96 * 1024;
// One unit of probability, and of the fraction of a square, is 2^-40.
constexpr double routing_units = 1099511627776.0;

// Unsigned numbers in the order of floats; -0 and 0 are one. No float but a NaN gives 0.
FIVEDP_DEVICE std::uint32_t ordered(float value) {
    const std::uint32_t bits = float_as_bits(value + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FIVEDP_DEVICE std::uint64_t ordered(double value) {
    const std::uint64_t bits = double_as_bits(value + 0.0);
    return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}
FIVEDP_DEVICE std::uint32_t highest_of_warp(std::uint32_t value) {
    return warp_highest(value);
}
FIVEDP_DEVICE std::uint64_t highest_of_warp(std::uint64_t value) {
    const std::uint32_t high = static_cast<std::uint32_t>(value >> 32), highest = warp_highest(high);
    const std::uint32_t low = warp_highest(high == highest ? static_cast<std::uint32_t>(value) : 0u);
    return static_cast<std::uint64_t>(highest) << 32 | low;
}

template <class S>
using Ordered = decltype(ordered(S()));

// What a warp has in shared memory.
template <class S>
struct WarpRows {
    std::int64_t* probabilities;  // (experts)
    S* row;                       // (experts)
    S* group_sums;                // (groups)
};

// Gives the experts of groups that are not among the best the key of masked ones. A group's lanes (as many as there are
// for it) go through its keys, keeping their two highest.
template <class S, int registers>
FIVEDP_DEVICE void mask_groups(const DeviceRouting& problem, const WarpRows<S>& rows, S (&keys)[registers]) {
    const int groups = problem.groups, size = problem.experts / groups;
    FIVEDP_UNROLL
    for (int r = 0; r < registers; ++r)
        if (32 * r + lane() < problem.experts) rows.row[32 * r + lane()] = keys[r];
    warp_sync();
    int width = 32;
    while (width > 1 && 32 / width < groups) width /= 2;
    for (int first = 0; first < groups; first += 32 / width) {
        const int group = first + lane() / width;
        S high = no_number<S>(), low = high;
        if (group < groups)
            for (int i = lane() % width; i < size; i += width) {
                const S key = rows.row[group * size + i];
                low = larger(low, key > high ? high : key);
                high = larger(high, key);
            }
        for (int half = width / 2; half > 0; half /= 2) {
            const S other_high = warp_xor(high, half), other_low = warp_xor(low, half);
            low = larger(larger(low, other_low), high > other_high ? other_high : high);
            high = larger(high, other_high);
        }
        if (group < groups && lane() % width == 0) rows.group_sums[group] = size == 1 ? high : high + low;
    }
    warp_sync();
    const S masked = problem.zero_mask ? S(0) : no_number<S>();
    FIVEDP_UNROLL
    for (int r = 0; r < registers; ++r) {
        if (32 * r >= problem.experts) continue;
        const int mine = (32 * r + lane()) / size;
        if (mine >= groups) continue;
        const S sum = rows.group_sums[mine];
        int before = 0;
        for (int group = 0; group < groups; ++group) {
            const S other = rows.group_sums[group];
            before += other > sum || (other == sum && group < mine);
        }
        if (before >= problem.top_groups) keys[r] = masked;
    }
    warp_sync();  // the row is used again
}

// Lane s gets the expert of slot s: the s-th highest key, equal ones by expert.
template <class S, int registers>
FIVEDP_DEVICE int best_experts(const DeviceRouting& problem, const S (&keys)[registers]) {
    Ordered<S> left[registers];  // 0 where there is none, or none any more
    FIVEDP_UNROLL
    for (int r = 0; r < registers; ++r) left[r] = 32 * r + lane() < problem.experts ? ordered(keys[r]) : Ordered<S>(0);
    int chosen = -1;
    for (int slot = 0; slot < problem.top_k; ++slot) {
        Ordered<S> best = left[0];
        FIVEDP_UNROLL
        for (int r = 1; r < registers; ++r) best = left[r] > best ? left[r] : best;
        best = highest_of_warp(best);
        std::uint32_t expert = 0xffffffffu;
        FIVEDP_UNROLL
        for (int r = registers - 1; r >= 0; --r)
            if (left[r] == best) expert = static_cast<std::uint32_t>(32 * r + lane());
        expert = warp_lowest(expert);
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r)
            if (static_cast<std::uint32_t>(32 * r + lane()) == expert) left[r] = 0;
        if (lane() == slot) chosen = static_cast<int>(expert);
    }
    return chosen < problem.experts ? chosen : -1;  // keys of NaN may run out
}

template <class S, int registers>
FIVEDP_KERNEL(32 * routing_warps, sizeof(S) == 8    ? 2
                                  : registers == 32 ? 3
                                                    : 4)
route_tokens(DeviceRouting problem, bool shared_choices) {
    const int experts = problem.experts, slots = problem.top_k, warp_number = warp();
    const std::int64_t pairs = static_cast<std::int64_t>(slots) * experts;
    // All sums first, so that they are cleared together.
    auto* const all_probabilities = reinterpret_cast<std::int64_t*>(dynamic_shared());
    auto* const choices = reinterpret_cast<std::int32_t*>(all_probabilities + routing_warps * experts);
    auto* const rows_begin = reinterpret_cast<char*>(choices) + (shared_choices ? (pairs * 4 + 7) / 8 * 8 : 0);
    WarpRows<S> rows;
    rows.probabilities = all_probabilities + warp_number * experts;
    rows.row = reinterpret_cast<S*>(rows_begin) + warp_number * (experts + problem.groups);
    rows.group_sums = rows.row + experts;
    for (int i = thread(); i < routing_warps * experts; i += 32 * routing_warps) all_probabilities[i] = 0;
    if (shared_choices)
        for (int i = thread(); i < pairs; i += 32 * routing_warps) choices[i] = 0;
    sync_block();

    std::int64_t whole = 0, fraction = 0, beyond = 0, invalid = no_row, unknown = no_row;
    for (std::int64_t row = block_x() * routing_warps + warp_number; row < problem.tokens;
         row += blocks_x() * routing_warps) {
        S logits[registers], scores[registers];
        if (!read_row(problem, row, logits)) {
            invalid = row < invalid ? row : invalid;
            continue;
        }
        const TokenRow<S> token = score_row(problem, logits, scores);
        const double log_sum = static_cast<double>(token.log_sum);
        if (log_sum > 1048576.0 || log_sum < -1048576.0) {
            ++beyond;
        } else {
            const double square = rounded_product(log_sum, log_sum);
            const std::int64_t below = static_cast<std::int64_t>(square);
            whole += below;
            fraction +=
                static_cast<std::int64_t>(rounded_product(square - static_cast<double>(below), routing_units) + 0.5);
        }
        if (lane() == 0) static_cast<S*>(problem.log_sum)[row] = token.log_sum;
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r) {
            const int expert = 32 * r + lane();
            if (expert >= experts) continue;
            const double probability = static_cast<double>(rounded_product(scores[r], token.probability_factor));
            rows.probabilities[expert] += rounded(rounded_product(probability, routing_units));
            if (problem.scores != nullptr) static_cast<S*>(problem.scores)[row * experts + expert] = scores[r];
        }
        if (problem.choice == DeviceChoice::none) continue;

        // What is compared: where scores are so close, or so small, that they round to one number, logits still tell
        // them apart. And of what slots take theirs: with both, logits and scores need no registers any more.
        const bool plain = problem.bias == nullptr && problem.groups == 1;
        const bool of_logits = problem.normalize && !problem.sigmoid;
        S keys[registers], values[registers];
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r) {
            const int expert = 32 * r + lane();
            keys[r] = plain ? logits[r] : scores[r];
            if (problem.bias != nullptr && expert < experts) keys[r] += static_cast<const S*>(problem.bias)[expert];
            values[r] = of_logits ? logits[r] : scores[r];
        }
        if (problem.groups > 1 && problem.choice == DeviceChoice::by_score) mask_groups(problem, rows, keys);
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r)
            if (32 * r + lane() < experts) rows.row[32 * r + lane()] = values[r];
        warp_sync();
        int chosen = -1;
        if (problem.choice == DeviceChoice::by_score) {
            chosen = best_experts(problem, keys);
        } else {
            if (lane() < slots) chosen = problem.chosen[row * slots + lane()];
            if (warp_ballot(chosen < -1 || chosen >= experts) != 0) {
                unknown = row < unknown ? row : unknown;
                if (chosen >= experts || chosen < 0) chosen = -1;
            }
        }
        const bool filled = lane() < slots && chosen >= 0;
        const SlotScore<S> slot = score_slots(problem, filled, filled ? rows.row[chosen] : S(0));
        warp_sync();  // the next token's row
        if (lane() < slots) {
            const std::int64_t place = row * slots + lane();
            if (problem.choice == DeviceChoice::by_score) problem.chosen[place] = chosen;
            static_cast<S*>(problem.weights)[place] =
                rounded_product(rounded_product(slot.score, slot.factor), S(problem.scale));
        }
        if (filled && shared_choices)
            atomic_add(choices + lane() * experts + chosen, 1);
        else if (filled)
            atomic_add(problem.numbers + first_choice + lane() * experts + chosen, std::int64_t(1));
    }
    if (lane() == 0) {
        if (invalid != no_row) atomic_lower(problem.numbers + first_invalid, invalid);
        if (unknown != no_row) atomic_lower(problem.numbers + first_unknown, unknown);
        atomic_add(problem.numbers + square_whole, whole);
        atomic_add(problem.numbers + square_fraction, fraction);
        atomic_add(problem.numbers + square_beyond, beyond);
    }
    sync_block();
    for (int expert = thread(); expert < experts; expert += 32 * routing_warps) {
        std::int64_t sum = 0;
        for (int w = 0; w < routing_warps; ++w) sum += all_probabilities[w * experts + expert];
        atomic_add(problem.numbers + first_choice + pairs + expert, sum);
    }
    if (shared_choices)
        for (int i = thread(); i < pairs; i += 32 * routing_warps)
            if (choices[i] != 0) atomic_add(problem.numbers + first_choice + i, std::int64_t(choices[i]));
}

FIVEDP_KERNEL(256, 4)
clear_numbers(std::int64_t* numbers, std::int64_t n) {
    const std::int64_t i = block_x() * 256 + thread();
    if (i < n) numbers[i] = i == first_invalid || i == first_unknown ? no_row : 0;
}

}  // namespace

void routing_forward(const DeviceRouting& problem, Stream stream) {
    const std::int64_t pairs = static_cast<std::int64_t>(problem.top_k) * problem.experts;
    const std::int64_t n = first_choice + pairs + problem.experts;  // whole numbers
    launch(clear_numbers, (n + 255) / 256, 1, 1, 256, 0, stream, problem.numbers, n);
    const auto start = [&](auto sum) {
        using S = decltype(sum);
        const std::int64_t size = sizeof(S);
        const std::int64_t rows = routing_warps * (problem.experts * (8 + size) + problem.groups * size);
        const std::int64_t choices = (pairs * 4 + 7) / 8 * 8;
        const bool shared_choices = rows + choices <= most_shared_bytes;
        // As many blocks as there is room for, so that each of them ends only once.
        const std::int64_t room = 4 * static_cast<std::int64_t>(multiprocessors());
        const std::int64_t wanted = (problem.tokens + routing_warps - 1) / routing_warps;
        with_registers(problem.experts, [&](auto registers) {
            launch(route_tokens<S, decltype(registers)::value>, wanted < room ? wanted : room, 1, 1, 32 * routing_warps,
                   rows + (shared_choices ? choices : 0), stream, problem, shared_choices);
        });
    };
    if (problem.type == DeviceType::f64)
        start(double());
    else
        start(float());
}

}  // namespace fivedp
