// From pairs (token, expert) to the order of an owner's rows: by expert, then source rank, then row of the source. And
// which pairs an expert's capacity leaves out. Both are stable counting; nothing is compared, and no order of atomics
// matters.
//
// Pairs come by source and token, so a pair's place is the number of pairs of lower experts, and of its own expert
// before it. Three kernels, over tiles of 2048 pairs (256 threads, each with 8):
//   1. a tile counts its pairs of every expert in shared memory (and the rows that begin in it);
//   2. a warp for every expert adds the tiles' counts up, each tile getting the sum before it;
//   3. a tile adds the experts' totals up, counts its pairs again warp by warp, and numbers them: lanes with the same
//      expert find each other by one instruction, and the lanes below are those that come before.
// A tile has pairs of one source, so a row's number on its source is the number of rows that began since its first
// tile.
//
// Shared memory of 3: a total and 8 warps' counts for each expert, 36 bytes: 9 KiB for 256. Bytes: about 20 read and 28
// written a pair, and 8 for each tile and expert: T = 32768, k = 8 are 262144 pairs in 128 tiles, 13 MB, 3 us at 4.8
// TB/s; so three launches of small kernels, about 10 us, are what it costs.
#include "cuda/block_sum.cuh"
#include "cuda/dispatch_order.hpp"

namespace fivedp {
namespace {

constexpr int order_threads = 256;
constexpr int order_warps = order_threads / 32;
constexpr int turns = tile_pairs / order_threads;  // pairs of a lane

// The pairs of a tile: those of a source, and where they begin and end.
struct Tile {
    int source;
    std::int64_t begin, end;
};
FIVEDP_DEVICE Tile tile_of(const DispatchOrder& problem, std::int64_t tile) {
    if (tile >= problem.tiles) return {0, 0, 0};  // where there are no pairs at all
    int low = 0, high = problem.sources;          // first_tile[low] <= tile < first_tile[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (problem.first_tile[middle] <= tile)
            low = middle;
        else
            high = middle;
    }
    const std::int64_t begin = problem.starts[low] + (tile - problem.first_tile[low]) * tile_pairs;
    const std::int64_t end = begin + tile_pairs, last = problem.starts[low + 1];
    return {low, begin, end < last ? end : last};
}

// The pair of a lane in a turn: a warp has 256 neighbours, 32 a turn.
FIVEDP_DEVICE std::int64_t pair_of(const Tile& tile, int turn) {
    return tile.begin + (thread() / 32) * (32 * turns) + 32 * turn + lane();
}

// The expert's number here; -1 for none.
FIVEDP_DEVICE int local_expert(const DispatchOrder& problem, std::int64_t pair) {
    const int expert = problem.expert[pair] - problem.first_expert;
    return expert >= 0 && expert < problem.experts ? expert : -1;
}
FIVEDP_DEVICE std::int32_t token_of(const DispatchOrder& problem, std::int64_t pair, std::int64_t start) {
    return problem.token != nullptr ? problem.token[pair] : static_cast<std::int32_t>((pair - start) / problem.slots);
}

// Whether a row begins with this pair, which has a place: no pair of its token has one before.
FIVEDP_DEVICE bool begins_row(const DispatchOrder& problem, std::int64_t pair, std::int64_t start) {
    const std::int32_t token = token_of(problem, pair, start);
    for (--pair; pair >= start && token_of(problem, pair, start) == token; --pair)
        if (local_expert(problem, pair) >= 0) return false;
    return true;
}

// Kernel 1. workspace[expert * tiles + tile]; `experts` itself counts rows.
FIVEDP_KERNEL(order_threads, 4)
count_pairs(DispatchOrder problem) {
    auto* const counts = reinterpret_cast<int*>(dynamic_shared());
    const Tile tile = tile_of(problem, block_x());
    for (int i = thread(); i <= problem.experts; i += order_threads) counts[i] = 0;
    sync_block();
    int rows = 0;
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::int64_t pair = pair_of(tile, turn);
        const int expert = pair < tile.end ? local_expert(problem, pair) : -1;
        if (expert < 0) continue;
        atomic_add(counts + expert, 1);
        rows += begins_row(problem, pair, problem.starts[tile.source]);
    }
    rows = warp_sum(rows);
    if (lane() == 0 && rows > 0) atomic_add(counts + problem.experts, rows);
    sync_block();
    for (int i = thread(); i <= problem.experts; i += order_threads)
        problem.workspace[i * problem.tiles + block_x()] = counts[i];
}

// The sum of a value over the lanes below, and over all.
struct LaneSums {
    int before, total;
};
FIVEDP_DEVICE LaneSums lane_sums(int value) {
    int sum = value;
    FIVEDP_UNROLL
    for (int distance = 1; distance < 32; distance *= 2) {
        const int below = warp_up(sum, distance);
        if (lane() >= distance) sum += below;
    }
    return {sum - value, warp_from(sum, 31)};
}

// Kernel 2. Each of n rows of `tiles` counts becomes what lies before each; behind all rows, their totals.
FIVEDP_KERNEL(order_threads, 4)
add_tiles(std::int32_t* workspace, std::int64_t n, std::int64_t tiles, std::int64_t* counts, std::int64_t n_counts) {
    const std::int64_t row = block_x() * order_warps + warp();
    if (row >= n) return;
    std::int32_t* const values = workspace + row * tiles;
    int sum = 0;
    for (std::int64_t first = 0; first < tiles; first += 32) {
        const bool there = first + lane() < tiles;
        const LaneSums sums = lane_sums(there ? values[first + lane()] : 0);
        if (there) values[first + lane()] = sum + sums.before;
        sum += sums.total;
    }
    if (lane() != 0) return;
    workspace[n * tiles + row] = sum;
    if (row < n_counts) counts[row] = sum;
}

// Replaces n values of shared memory by the sums of those before, and returns the sum of all.
FIVEDP_DEVICE int add_up(int* values, int n, int* room) {
    int sum = 0;
    for (int first = 0; first < n; first += order_threads) {
        const int i = first + thread();
        const LaneSums sums = lane_sums(i < n ? values[i] : 0);
        if (lane() == 0) room[thread() / 32] = sums.total;
        sync_block();
        int before = sum + sums.before;
        for (int w = 0; w < order_warps; ++w) {
            if (w < thread() / 32) before += room[w];
            sum += room[w];
        }
        if (i < n) values[i] = before;
        sync_block();
    }
    return sum;
}

// Numbers the pairs of a tile: calls place(turn, number) for those whose key is not -1, where the number is that of
// `next` for the warp and key, in the order of pairs. `next` has a row of `keys` for each warp, counted already.
template <class Place>
FIVEDP_DEVICE void number_pairs(const int (&key)[turns], int* next, const Place& place) {
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::uint32_t same = warp_match(key[turn]);
        const int before = count_bits(same & ((1u << lane()) - 1));
        const int number = key[turn] >= 0 ? next[key[turn]] + before : 0;
        warp_sync();
        if (key[turn] >= 0 && before == 0) next[key[turn]] = number + count_bits(same);
        warp_sync();
        if (key[turn] >= 0) place(turn, number);
    }
}

// Kernel 3.
FIVEDP_KERNEL(order_threads, 3)
place_pairs(DispatchOrder problem) {
    const int experts = problem.experts;
    auto* const base = reinterpret_cast<int*>(dynamic_shared());  // (experts): where its rows begin
    int* const room = base + experts;                             // (order_warps)
    int* const began = room + order_warps;                        // (order_warps): rows that begin in a warp's pairs
    int* const next = began + order_warps;                        // (order_warps, experts)
    const std::int32_t* const totals = problem.workspace + (experts + 1) * problem.tiles;
    for (int i = thread(); i < experts; i += order_threads) base[i] = totals[i];
    for (int i = thread(); i < order_warps * experts; i += order_threads) next[i] = 0;
    sync_block();
    const int total = add_up(base, experts, room);

    const Tile tile = tile_of(problem, block_x());
    const std::int64_t start = problem.sources > 0 ? problem.starts[tile.source] : 0;
    int key[turns], n_began = 0;
    std::uint32_t begins = 0;
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::int64_t pair = pair_of(tile, turn);
        key[turn] = pair < tile.end ? local_expert(problem, pair) : -1;
        if (key[turn] < 0) continue;
        atomic_add(next + (thread() / 32) * experts + key[turn], 1);
        begins |= static_cast<std::uint32_t>(begins_row(problem, pair, start)) << turn;
    }
    n_began = warp_sum(count_bits(begins));
    if (lane() == 0) began[thread() / 32] = n_began;
    sync_block();
    const auto before_tile = [&](std::int64_t row, std::int64_t at) {
        return at < problem.tiles ? problem.workspace[row * problem.tiles + at] : totals[row];
    };
    for (int i = thread(); i < experts; i += order_threads) {
        int at = base[i] + before_tile(i, block_x());
        for (int w = 0; w < order_warps; ++w) {
            const int n = next[w * experts + i];
            next[w * experts + i] = at;
            at += n;
        }
    }
    // The number of the row before the first that begins in this warp's pairs.
    int row = tile.end > tile.begin
                  ? before_tile(experts, block_x()) - before_tile(experts, problem.first_tile[tile.source]) - 1
                  : 0;
    for (int w = 0; w < thread() / 32; ++w) row += began[w];
    sync_block();

    int rows[turns];
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::uint32_t here = warp_ballot(begins >> turn & 1);
        rows[turn] = row + count_bits(here & (0xffffffffu >> (31 - lane())));
        row += count_bits(here);
    }
    number_pairs(key, next + (thread() / 32) * experts, [&](int turn, int number) {
        const std::int64_t pair = pair_of(tile, turn);
        problem.source[number] = tile.source;
        problem.row_token[number] = token_of(problem, pair, start);
        problem.row[number] = rows[turn];
        problem.positions[pair] = number;
        if (problem.weights == nullptr) return;
        if (problem.weight_bytes == 8)
            static_cast<double*>(problem.row_weights)[number] = static_cast<const double*>(problem.weights)[pair];
        else
            static_cast<float*>(problem.row_weights)[number] = static_cast<const float*>(problem.weights)[pair];
    });
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::int64_t pair = pair_of(tile, turn);
        if (pair >= tile.end) continue;
        if (key[turn] < 0) problem.positions[pair] = -1;
        if (pair < total) continue;
        problem.source[pair] = problem.row_token[pair] = problem.row[pair] = -1;
        if (problem.weights == nullptr) continue;
        if (problem.weight_bytes == 8)
            static_cast<double*>(problem.row_weights)[pair] = 0;
        else
            static_cast<float*>(problem.row_weights)[pair] = 0;
    }
    if (block_x() != 0) return;
    for (int i = thread(); i < experts; i += order_threads) problem.offsets[i] = base[i];
    if (thread() == 0) problem.offsets[experts] = total;
    for (int i = thread(); i < problem.sources; i += order_threads)
        problem.n_rows[i] =
            before_tile(experts, problem.first_tile[i + 1]) - before_tile(experts, problem.first_tile[i]);
}

// The same for capacities: block_y is a slot, and its pairs are those of the tokens. Kernel 1.
FIVEDP_KERNEL(order_threads, 4)
count_slot(DropProblem problem, std::int64_t tiles) {
    auto* const counts = reinterpret_cast<int*>(dynamic_shared());
    const Tile tile{0, block_x() * tile_pairs, problem.tokens};
    for (int i = thread(); i < problem.experts; i += order_threads) counts[i] = 0;
    sync_block();
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::int64_t token = pair_of(tile, turn);
        const int expert = token < tile.end ? problem.chosen[token * problem.slots + block_y()] : -1;
        if (expert >= 0 && expert < problem.experts) atomic_add(counts + expert, 1);
    }
    sync_block();
    for (int i = thread(); i < problem.experts; i += order_threads)
        problem.workspace[(block_y() * problem.experts + i) * tiles + block_x()] = counts[i];
}

// Kernel 3.
FIVEDP_KERNEL(order_threads, 4)
drop_slot(DropProblem problem, std::int64_t tiles) {
    const int experts = problem.experts;
    auto* const next = reinterpret_cast<int*>(dynamic_shared());  // (order_warps, experts)
    const Tile tile{0, block_x() * tile_pairs, problem.tokens};
    for (int i = thread(); i < order_warps * experts; i += order_threads) next[i] = 0;
    sync_block();
    int key[turns];
    FIVEDP_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
        const std::int64_t token = pair_of(tile, turn);
        key[turn] = token < tile.end ? problem.chosen[token * problem.slots + block_y()] : -1;
        if (key[turn] >= experts) key[turn] = -1;
        if (key[turn] < 0) {
            key[turn] = -1;
            if (token < tile.end) problem.kept[token * problem.slots + block_y()] = -1;
        } else {
            atomic_add(next + (thread() / 32) * experts + key[turn], 1);
        }
    }
    sync_block();
    for (int i = thread(); i < experts; i += order_threads) {
        int at = problem.workspace[(block_y() * experts + i) * tiles + block_x()];
        for (int w = 0; w < order_warps; ++w) {
            const int n = next[w * experts + i];
            next[w * experts + i] = at;
            at += n;
        }
    }
    sync_block();
    number_pairs(key, next + (thread() / 32) * experts, [&](int turn, int number) {
        const bool stays = problem.before[block_y() * experts + key[turn]] + number < problem.capacity;
        problem.kept[pair_of(tile, turn) * problem.slots + block_y()] = stays ? key[turn] : -1;
    });
}

}  // namespace

void dispatch_order(const DispatchOrder& problem, Stream stream) {
    const std::int64_t rows = problem.experts + 1;
    launch(count_pairs, problem.tiles, 1, 1, order_threads, rows * 4, stream, problem);
    launch(add_tiles, (rows + order_warps - 1) / order_warps, 1, 1, order_threads, 0, stream, problem.workspace, rows,
           problem.tiles, problem.counts, static_cast<std::int64_t>(problem.experts));
    // Borders are written even where there are no pairs.
    launch(place_pairs, problem.tiles > 0 ? problem.tiles : 1, 1, 1, order_threads,
           (problem.experts * (1 + order_warps) + 2 * order_warps) * 4, stream, problem);
}

void drop_by_position(const DropProblem& problem, Stream stream) {
    const std::int64_t tiles = (problem.tokens + tile_pairs - 1) / tile_pairs;
    const std::int64_t rows = static_cast<std::int64_t>(problem.slots) * problem.experts;
    launch(count_slot, tiles, problem.slots, 1, order_threads, problem.experts * 4, stream, problem, tiles);
    if (tiles > 0)
        launch(add_tiles, (rows + order_warps - 1) / order_warps, 1, 1, order_threads, 0, stream, problem.workspace,
               rows, tiles, static_cast<std::int64_t*>(nullptr), std::int64_t(0));
    launch(drop_slot, tiles, problem.slots, 1, order_threads, order_warps * problem.experts * 4, stream, problem,
           tiles);
}

}  // namespace fivedp
