#include "cpu/sum_plan.hpp"

#include <algorithm>

namespace fivedp {
namespace {

int count_ones(std::int64_t value) {
    int ones = 0;
    for (; value != 0; value &= value - 1) ++ones;
    return ones;
}

// The chains of one shard, with every slot still one of the block.
void add_shard(const std::int64_t* cuts, std::int64_t n_shards, std::int64_t shard, int unit_k,
               std::vector<Chain>& chains) {
    const int depth = count_ones(shard);  // open subtrees before this shard
    std::int64_t k = cuts[shard];
    bool begun = false;
    do {
        Chain chain{};
        chain.k_begin = k;
        chain.k_end = std::min(k + k_block, cuts[shard + 1]);
        chain.units = (chain.k_end - chain.k_begin + unit_k - 1) / unit_k;
        if (begun) chain.open[chain.n_open++] = static_cast<std::int8_t>(depth);
        chain.to = static_cast<std::int8_t>(depth);
        k = chain.k_end;
        begun = true;
        if (k == cuts[shard + 1]) {
            const bool last = shard + 1 == n_shards;
            int left = depth;
            for (std::int64_t bits = shard; left > 0 && (last || (bits & 1) != 0); bits >>= 1)
                chain.open[chain.n_open++] = static_cast<std::int8_t>(--left);
            chain.to = last ? to_c : static_cast<std::int8_t>(left);
        }
        chains.push_back(chain);
    } while (k < cuts[shard + 1]);
}

}  // namespace

void default_cuts(std::int64_t k, std::int64_t* cuts) {
    for (std::int64_t shard = 0; shard <= default_shards; ++shard)
        cuts[shard] = shard * (k / default_shards) + std::min(shard, k % default_shards);
}

void plan_sum(const std::int64_t* cuts, std::int64_t n_shards, const GemmKernel& kernel, SumPlan& plan) {
    plan.chains.clear();
    plan.passes.clear();
    plan.rounds.clear();
    plan.most_passes = plan.n_slots = plan.n_strip_slots = plan.n_tile_slots = 0;
    std::vector<Chain>& chains = plan.chains;
    for (std::int64_t shard = 0; shard < n_shards; ++shard) add_shard(cuts, n_shards, shard, kernel.unit_k, chains);

    for (std::size_t first = 0, end = 0; first < chains.size(); first = end) {
        Pass pass{};
        pass.chains = &chains[first];
        pass.k_begin = chains[first].k_begin;
        pass.together = true;
        for (; end < chains.size() && pass.n_chains < max_chains_per_pass; ++end) {
            Chain& chain = chains[end];
            if (end > first && pass.units + chain.units > kernel.pass_units) break;
            // Whole units up to here: the pass can be packed as one range of k.
            if ((chain.k_begin - pass.k_begin) != pass.units * kernel.unit_k) pass.together = false;
            chain.unit_begin = pass.units;
            pass.units += chain.units;
            pass.k_end = chain.k_end;
            ++pass.n_chains;
        }
        plan.passes.push_back(pass);
    }

    const std::size_t n_passes = plan.passes.size(), longest = static_cast<std::size_t>(kernel.round_passes);
    for (std::size_t first = 0; first < n_passes; first += longest) {
        const std::size_t end = std::min(first + longest, n_passes);
        const Pass* const passes = &plan.passes[first];
        const int count = static_cast<int>(end - first);
        plan.rounds.push_back({passes, count, passes[0].k_begin, passes[count - 1].k_end});
        plan.most_passes = std::max(plan.most_passes, count);

        // The smallest slot that lives until the chain that takes the sum up: the next one to name its slot.
        const auto chain_of = [&](const Pass& pass) { return static_cast<std::size_t>(pass.chains - chains.data()); };
        const std::size_t end_of_round = end < n_passes ? chain_of(plan.passes[end]) : chains.size();
        for (std::size_t p = first; p < end; ++p) {
            const std::size_t end_of_pass = p + 1 < n_passes ? chain_of(plan.passes[p + 1]) : chains.size();
            for (std::size_t i = chain_of(plan.passes[p]); i < end_of_pass; ++i) {
                Chain& writer = chains[i];
                if (writer.to == to_c) continue;
                const std::int8_t slot = writer.to;
                for (std::size_t j = i + 1; j < end_of_round; ++j) {
                    Chain& reader = chains[j];
                    std::int8_t* const found = std::find(reader.open, reader.open + reader.n_open, slot);
                    if (found == reader.open + reader.n_open) continue;
                    const bool same_pass = j < end_of_pass;
                    writer.to = *found =
                        static_cast<std::int8_t>((same_pass ? first_tile_slot : first_strip_slot) - slot);
                    int& count_of_kind = same_pass ? plan.n_tile_slots : plan.n_strip_slots;
                    count_of_kind = std::max(count_of_kind, slot + 1);
                    break;
                }
                if (writer.to >= 0) plan.n_slots = std::max(plan.n_slots, writer.to + 1);
            }
        }
    }
}

}  // namespace fivedp
