// The gradient of routing by the logits, to the CPU's bits.
//
// A warp has a token. Its scores are computed again from the logits; with them the numbers that all experts share (the
// mean of the balance loss's derivative, that of the weights' gradients) are known, and then each logit's gradient is a
// sum of at most four terms, in a fixed order:
//   balance   q_i (b_i - sum_j b_j q_j), q the probabilities; with s_i' / sum_j s_j for the first q_i of sigmoids
//   weights   softmax over the chosen S:  c v_i (u_i - sum_S v_j u_j), v the softmax over S; 0 outside S
//             softmax over all:           c p_i ([i in S] u_i - sum_S p_j u_j)
//             sigmoid, divided by D:      c s_i' / D (u_i - sum_S s_j u_j / D); 0 outside S
//             sigmoid:                    c s_i' u_i; 0 outside S
//   z-loss    z_factor log_sum p_i
// with c the scale and u the gradient of a weight, 0 where the pair was dropped. Lane s has slot s. A map in shared
// memory says in which slot an expert is (a byte an expert), so that a token's experts must differ.
//
// Bytes: a logit read, a gradient written, 12 bytes a pair read; 4 T E each way in float32.
#include "cuda/routing_row.cuh"

namespace fivedp {
namespace {

constexpr int backward_warps = 4;

template <class S, int registers>
FIVEDP_KERNEL(32 * backward_warps, sizeof(S) == 4 ? 4 : 2)
route_backward(DeviceRouting problem) {
    const int experts = problem.experts, slots = problem.top_k, warp_number = warp();
    S* const row_memory = reinterpret_cast<S*>(dynamic_shared()) + warp_number * experts;
    // The slot of every expert, plus 1; 0 outside.
    auto* const slot_of = reinterpret_cast<unsigned char*>(dynamic_shared()) +
                          backward_warps * experts * static_cast<int>(sizeof(S)) + warp_number * experts;
    for (int expert = lane(); expert < experts; expert += 32) slot_of[expert] = 0;
    const S scale = S(problem.scale);
    for (std::int64_t row = block_x() * backward_warps + warp_number; row < problem.tokens;
         row += blocks_x() * backward_warps) {
        S logits[registers], scores[registers];
        read_row(problem, row, logits);
        const TokenRow<S> token = score_row(problem, logits, scores);
        const auto* const balance = static_cast<const S*>(problem.balance);
        S mean_balance = 0;
        if (balance != nullptr)
            mean_balance = row_sum<S, registers>([&](int r) {
                const int expert = 32 * r + lane();
                const S b = expert < experts ? balance[expert] : S(0);
                return rounded_product(b, rounded_product(scores[r], token.probability_factor));
            });

        // Slots.
        const std::int64_t place = row * slots + lane();
        int chosen = lane() < slots ? problem.chosen[place] : -1;
        if (chosen < 0 || chosen >= experts) chosen = -1;
        const S gradient =
            lane() < slots && problem.kept[place] >= 0 ? static_cast<const S*>(problem.d_weights)[place] : S(0);
        // Sigmoids are computed again where they are wanted, with their slopes.
        const bool of_logits = problem.normalize || problem.sigmoid;
        warp_sync();  // the token before
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r)
            if (32 * r + lane() < experts) row_memory[32 * r + lane()] = of_logits ? logits[r] : scores[r];
        if (chosen >= 0) slot_of[chosen] = static_cast<unsigned char>(lane() + 1);
        warp_sync();
        const S read = chosen >= 0 ? row_memory[chosen] : S(0);
        const SlotScore<S> slot = score_slots(problem, chosen >= 0, problem.sigmoid ? sigmoid(read) : read);
        S mean = 0;
        if (problem.normalize || !problem.sigmoid) {
            const S share = rounded_product(rounded_product(slot.score, slot.factor), gradient);
            for (int i = 0; i < slots; ++i) mean += warp_from(share, i);
        }
        const bool of_all = !problem.normalize && !problem.sigmoid;
        const S all = rounded_product(-scale, mean), less = of_all ? S(0) : mean;
        const S slope = problem.sigmoid ? sigmoid_slope(read) : slot.score;
        const S term = rounded_product(rounded_product(rounded_product(scale, slot.factor), slope), gradient - less);
        S z_factor = S(problem.z_factor);
        if (problem.z_factor != 0) {
            z_factor = rounded_product(z_factor, static_cast<const S*>(problem.log_sum)[row]);
            if (problem.sigmoid) z_factor = rounded_product(z_factor, token.softmax_inverse);
        }

        S* const to = static_cast<S*>(problem.d_logits) + row * experts;
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r) {
            if (32 * r >= experts) continue;
            const int expert = 32 * r + lane();
            const bool inside = expert < experts;
            const S logit = problem.sigmoid && inside ? row_memory[expert] : S(0);  // registers are short here
            S d = 0;
            if (balance != nullptr) {
                const S first = problem.sigmoid ? sigmoid_slope(logit) : scores[r];
                d = rounded_product(rounded_product(first, token.probability_factor),
                                    (inside ? balance[expert] : S(0)) - mean_balance);
            }
            if (of_all) d = fused(scores[r], all, d);
            const int its_slot = inside ? slot_of[expert] : 0;
            const S of_slot = warp_from(term, its_slot > 0 ? its_slot - 1 : 0);
            if (its_slot > 0) d += of_slot;
            if (problem.z_factor != 0)
                d = fused(problem.sigmoid ? cpu_exp(logit - token.highest) : scores[r], z_factor, d);
            if (inside) to[expert] = d;
        }
        warp_sync();
        if (chosen >= 0) slot_of[chosen] = 0;
    }
}

}  // namespace

void routing_backward(const DeviceRouting& problem, Stream stream) {
    const auto start = [&](auto sum) {
        using S = decltype(sum);
        const std::int64_t bytes = backward_warps * problem.experts * static_cast<std::int64_t>(sizeof(S) + 1);
        const std::int64_t room = 4 * static_cast<std::int64_t>(multiprocessors());
        const std::int64_t wanted = (problem.tokens + backward_warps - 1) / backward_warps;
        with_registers(problem.experts, [&](auto registers) {
            launch(route_backward<S, decltype(registers)::value>, wanted < room ? wanted : room, 1, 1,
                   32 * backward_warps, bytes, stream, problem);
        });
    };
    if (problem.type == DeviceType::f64)
        start(double());
    else
        start(float());
}

}  // namespace fivedp
