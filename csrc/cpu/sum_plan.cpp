#include "cpu/sum_plan.hpp"

#include <algorithm>

namespace fivedp {
namespace {

int count_ones(std::int64_t value) {
    int ones = 0;
    for (; value != 0; value &= value - 1) ++ones;
    return ones;
}

// The chains of one shard, with every slot still in scratch.
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

void plan_sum(const std::int64_t* cuts, std::int64_t n_shards, int unit_k, std::int64_t pass_units, SumPlan& plan) {
    plan.chains.clear();
    plan.passes.clear();
    plan.n_slots = plan.n_local_slots = 0;
    for (std::int64_t shard = 0; shard < n_shards; ++shard) add_shard(cuts, n_shards, shard, unit_k, plan.chains);

    for (std::size_t first = 0; first < plan.chains.size();) {
        Pass pass{};
        pass.chains = &plan.chains[first];
        pass.k_begin = plan.chains[first].k_begin;
        pass.together = true;
        std::size_t end = first;
        for (; end < plan.chains.size() && pass.n_chains < max_chains_per_pass; ++end) {
            Chain& chain = plan.chains[end];
            if (end > first && pass.units + chain.units > pass_units) break;
            // Whole units up to here: the pass can be packed as one range of k.
            if ((chain.k_begin - pass.k_begin) != pass.units * unit_k) pass.together = false;
            chain.unit_begin = pass.units;
            pass.units += chain.units;
            pass.k_end = chain.k_end;
            ++pass.n_chains;
        }
        // A sum is local where the chain that takes it up, the next one to name its slot, is of this pass.
        for (std::size_t i = first; i < end; ++i) {
            Chain& writer = plan.chains[i];
            if (writer.to == to_c) continue;
            const std::int8_t slot = writer.to;
            for (std::size_t j = i + 1; j < end; ++j) {
                Chain& reader = plan.chains[j];
                std::int8_t* const found = std::find(reader.open, reader.open + reader.n_open, slot);
                if (found == reader.open + reader.n_open) continue;
                *found = static_cast<std::int8_t>(first_local_slot - slot);
                writer.to = static_cast<std::int8_t>(first_local_slot - slot);
                plan.n_local_slots = std::max(plan.n_local_slots, slot + 1);
                break;
            }
            if (writer.to >= 0) plan.n_slots = std::max(plan.n_slots, writer.to + 1);
        }
        plan.passes.push_back(pass);
        first = end;
    }
}

}  // namespace fivedp
