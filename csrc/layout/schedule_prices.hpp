// The bytes that every schedule of a spec would move, for given sizes.
//
// A rank receives the part of A and of B that its brick needs and its share lacks; the owners of C receive partial
// results of the bricks of other ranks. All are volumes of boxes, so a price is a sum over ranks of products of
// interval lengths. Which part of which index each rank needs and owns does not depend on the sizes and is prepared in
// Python (fivedp/layout/plan.py, where schedules are defined); here are the sums, about 10 ns per candidate, rank and
// dimension.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace fivedp {

// Borders `first` to `stop` of `parts` equal parts of an index.
struct Cut {
    std::int64_t parts, first, stop;
};

struct Interval {
    std::int64_t start, stop;
    std::int64_t length() const { return stop - start; }
};

// The block rule: the first size % parts parts hold one element more.
inline std::int64_t border(std::int64_t size, std::int64_t parts, std::int64_t part) {
    return part * (size / parts) + std::min(part, size % parts);
}

inline Interval interval(std::int64_t size, const Cut& cut) {
    return {border(size, cut.parts, cut.first), border(size, cut.parts, cut.stop)};
}

inline std::int64_t overlap(const Interval& x, const Interval& y) {
    return std::max<std::int64_t>(0, std::min(x.stop, y.stop) - std::max(x.start, y.start));
}

// Bytes of an element of A, B and finished C, of a partial sum, and of a whole sum that another rank finishes.
struct ItemSizes {
    std::int64_t a, b, c, partial, whole;
};

struct SchedulePrices {
    std::size_t n_indices, n_candidates, n_ranks;
    std::vector<Cut> needed;                  // (indices, candidates, ranks)
    std::vector<Cut> owned;                   // (slots, ranks); a slot is one dimension of A, then of B, then of C
    std::vector<std::size_t> slot_index;      // (slots): which index the dimension is
    std::array<std::size_t, 3> tensor_start;  // the first slot of A, B, C
    std::vector<std::int64_t> nodes;          // (candidates, ranks): subtrees that a rank computes
    std::vector<std::int64_t> total_nodes;    // (candidates): partial results per element of C
    std::int64_t replicas;                    // ranks that hold the same share of C
    std::vector<std::int64_t> slice_part;     // (dimensions of C, candidates, ranks), empty where replicas == 1
    std::vector<std::int64_t> messages;       // (1 + variants, candidates): the tie-break

    // moves: (2, candidates); result: (1 + variants, candidates), direct first, then two-phase by dimension of C.
    struct Prices {
        std::vector<std::int64_t> moves, result;
    };

    std::size_t n_slots() const { return slot_index.size(); }
    std::size_t n_variants() const { return replicas > 1 ? n_slots() - tensor_start[2] : 0; }

    Prices price(const std::vector<std::int64_t>& sizes, const ItemSizes& items) const {
        Prices prices;
        prices.moves.assign(2 * n_candidates, 0);
        prices.result.assign((1 + n_variants()) * n_candidates, 0);
        std::vector<Interval> held(n_slots());
        std::vector<Interval> wanted(n_slots());
        for (std::size_t rank = 0; rank < n_ranks; ++rank) {
            for (std::size_t slot = 0; slot < n_slots(); ++slot) {
                held[slot] = interval(sizes[slot_index[slot]], owned[slot * n_ranks + rank]);
            }
            for (std::size_t candidate = 0; candidate < n_candidates; ++candidate) {
                for (std::size_t slot = 0; slot < n_slots(); ++slot) {
                    const std::size_t index = slot_index[slot];
                    wanted[slot] = interval(sizes[index], needed[(index * n_candidates + candidate) * n_ranks + rank]);
                }
                add_inputs(prices, held, wanted, candidate, items);
                add_result(prices, held, wanted, candidate, rank, items);
            }
        }
        return prices;
    }

    // The schedule with the fewest bytes, among equals the one with the fewest messages.
    std::size_t cheapest(const Prices& prices) const {
        std::size_t best = 0;
        std::pair<std::int64_t, std::int64_t> least{INT64_MAX, INT64_MAX};
        for (std::size_t number = 0; number < prices.result.size(); ++number) {
            const std::size_t candidate = number % n_candidates;
            const std::int64_t bytes =
                prices.result[number] + prices.moves[candidate] + prices.moves[n_candidates + candidate];
            const std::pair<std::int64_t, std::int64_t> cost{bytes, messages[number]};
            if (cost < least) {
                least = cost;
                best = number;
            }
        }
        return best;
    }

  private:
    std::size_t end_of(std::size_t tensor) const { return tensor == 2 ? n_slots() : tensor_start[tensor + 1]; }

    void add_inputs(Prices& prices, const std::vector<Interval>& held, const std::vector<Interval>& wanted,
                    std::size_t candidate, const ItemSizes& items) const {
        // A brick without elements of C needs nothing.
        for (std::size_t slot = tensor_start[2]; slot < n_slots(); ++slot) {
            if (wanted[slot].length() == 0) {
                return;
            }
        }
        for (std::size_t tensor = 0; tensor < 2; ++tensor) {
            std::int64_t need = 1;
            std::int64_t have = 1;
            for (std::size_t slot = tensor_start[tensor]; slot < end_of(tensor); ++slot) {
                need *= wanted[slot].length();
                have *= overlap(wanted[slot], held[slot]);
            }
            prices.moves[tensor * n_candidates + candidate] += (need - have) * (tensor == 0 ? items.a : items.b);
        }
    }

    void add_result(Prices& prices, const std::vector<Interval>& held, const std::vector<Interval>& wanted,
                    std::size_t candidate, std::size_t rank, const ItemSizes& items) const {
        const std::int64_t mine = nodes[candidate * n_ranks + rank];
        const std::int64_t all = total_nodes[candidate];
        const std::int64_t wire = all == 1 ? items.whole : items.partial;
        const std::size_t first = tensor_start[2];
        std::int64_t share = 1;
        std::int64_t made_here = 1;
        for (std::size_t slot = first; slot < n_slots(); ++slot) {
            share *= held[slot].length();
            made_here *= overlap(wanted[slot], held[slot]);
        }
        prices.result[candidate] += (share * all - made_here * mine) * wire;
        for (std::size_t variant = 0; variant < n_variants(); ++variant) {
            std::int64_t slice = 1;
            std::int64_t slice_made_here = 1;
            for (std::size_t slot = first; slot < n_slots(); ++slot) {
                Interval part = held[slot];
                if (slot - first == variant) {
                    const std::int64_t number = slice_part[(variant * n_candidates + candidate) * n_ranks + rank];
                    const Interval inside = interval(part.length(), {replicas, number, number + 1});
                    part = {part.start + inside.start, part.start + inside.stop};
                }
                slice *= part.length();
                slice_made_here *= overlap(wanted[slot], part);
            }
            prices.result[(1 + variant) * n_candidates + candidate] +=
                (slice * all - slice_made_here * mine) * wire + (share - slice) * items.c;
        }
    }
};

}  // namespace fivedp
