// One token's row of logits in the registers of a warp: scores, sums over experts, the scores of chosen experts.
//
// Expert i is in register i / 32 of lane i % 32. Sums over experts have the order of the CPU: 16 lanes of float (8 of
// double), each adding its elements as they come, then halves. So lane j adds what lanes j + 16 (j + 8, ...) hold in
// between its own elements, which costs one shuffle (three) a register. Every result has the CPU's bits.
#pragma once

#include "cuda/cpu_math.cuh"
#include "cuda/routing.hpp"

namespace fivedp {

// Added to a sum of sigmoids before it divides.
constexpr double sigmoid_epsilon = 1e-20;

// Minus infinity, of float or double.
template <class S>
FIVEDP_DEVICE S no_number() {
    return S(bits_as_float(0xff800000u));
}

template <class S>
FIVEDP_DEVICE S larger(S x, S y) {
    return x > y ? x : y;
}

template <class S>
FIVEDP_DEVICE S warp_max(S value) {
    FIVEDP_UNROLL
    for (int half = 16; half > 0; half /= 2) value = larger(value, warp_xor(value, half));
    return value;
}

// The end of a sum whose parts are in the lowest lanes; all lanes get it.
template <class S>
FIVEDP_DEVICE S sum_of_parts(S part) {
    FIVEDP_UNROLL
    for (int half = 32 / static_cast<int>(sizeof(S)); half > 0; half /= 2) part += warp_xor(part, half);
    return warp_from(part, 0);
}

// The sum over a row of which `term(r)` is register r.
template <class S, int registers, class Term>
FIVEDP_DEVICE S row_sum(const Term& term) {
    constexpr int lanes = 64 / static_cast<int>(sizeof(S));
    S part = 0;
    FIVEDP_UNROLL
    for (int r = 0; r < registers; ++r) {
        const S value = term(r);
        part += value;
        FIVEDP_UNROLL
        for (int from = lanes; from < 32; from += lanes) part += warp_from(value, lane() + from);
    }
    return sum_of_parts(part);
}

// Registers of rows of up to so many experts; a kernel for each.
template <int n>
struct Registers {
    static constexpr int value = n;
};
template <class With>
void with_registers(int experts, const With& with) {
    if (experts <= 128) return with(Registers<4>());
    if (experts <= 256) return with(Registers<8>());
    with(Registers<32>());
}

// Reads a row of logits, minus infinity behind its end; false where one is not finite.
template <class S, int registers>
FIVEDP_DEVICE bool read_row(const DeviceRouting& problem, std::int64_t row, S (&logits)[registers]) {
    const std::int64_t at = row * problem.row_stride;
    const auto read = [&](const auto* from) {
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r) {
            const int expert = 32 * r + lane();
            logits[r] = expert < problem.experts ? S(to_float(from[at + expert])) : no_number<S>();
        }
    };
    if constexpr (sizeof(S) == 8)
        read(static_cast<const double*>(problem.logits));
    else if (problem.type == DeviceType::f32)
        read(static_cast<const float*>(problem.logits));
    else if (problem.type == DeviceType::bf16)
        read(static_cast<const Bf16*>(problem.logits));
    else
        read(static_cast<const Half*>(problem.logits));
    bool finite = true;
    FIVEDP_UNROLL
    for (int r = 0; r < registers; ++r)
        finite = finite && (32 * r + lane() >= problem.experts || logits[r] - logits[r] == S(0));
    return warp_ballot(finite) == 0xffffffffu;
}

// From exp(-|z|), so that nothing cancels; and its derivative.
template <class S>
FIVEDP_DEVICE S sigmoid(S z) {
    const S power = cpu_exp(z > S(0) ? -z : z), inverse = S(1) / (S(1) + power);
    return z >= S(0) ? inverse : rounded_product(power, inverse);
}
template <class S>
FIVEDP_DEVICE S sigmoid_slope(S z) {
    const S power = cpu_exp(z > S(0) ? -z : z), inverse = S(1) / (S(1) + power);
    return rounded_product(rounded_product(power, inverse), inverse);
}

// What a row gives beside its scores.
template <class S>
struct TokenRow {
    S highest, log_sum;
    S softmax_inverse;     // exp(z - highest) times this is the softmax
    S probability_factor;  // a score times this is what the balance loss takes for a probability
};

// Scores of a row: its softmax or the sigmoids; 0 behind its end.
template <class S, int registers>
FIVEDP_DEVICE TokenRow<S> score_row(const DeviceRouting& problem, const S (&logits)[registers],
                                    S (&scores)[registers]) {
    TokenRow<S> token;
    S highest = logits[0];
    FIVEDP_UNROLL
    for (int r = 1; r < registers; ++r) highest = larger(highest, logits[r]);
    token.highest = highest = warp_max(highest);
    const S sum = row_sum<S, registers>([&](int r) { return scores[r] = cpu_exp(logits[r] - highest); });
    token.softmax_inverse = S(1) / sum;
    token.log_sum = static_cast<S>(static_cast<double>(highest) + cpu_log(static_cast<double>(sum)));
    token.probability_factor = S(1);
    if (problem.sigmoid) {
        const S total = row_sum<S, registers>([&](int r) { return scores[r] = sigmoid(logits[r]); });
        token.probability_factor = S(1) / (total + S(sigmoid_epsilon));
    } else {
        FIVEDP_UNROLL
        for (int r = 0; r < registers; ++r) scores[r] = rounded_product(scores[r], token.softmax_inverse);
    }
    return token;
}

// The score of lane s's chosen expert, 0 in an empty slot: of a softmax over the chosen ones where weights are
// normalised. `factor` times it is the weight, but for the scale.
template <class S>
struct SlotScore {
    S score, factor;
};

// `value` is the expert's logit where a softmax is normalised, else its score.
template <class S>
FIVEDP_DEVICE SlotScore<S> score_slots(const DeviceRouting& problem, bool filled, S value) {
    if (problem.normalize && !problem.sigmoid) {
        const S logit = filled ? value : no_number<S>(), highest = warp_max(logit);
        // A token that no expert has taken: minus infinity less 0 stays what it is.
        const S score = cpu_exp(logit - (highest == no_number<S>() ? S(0) : highest));
        const S sum = row_sum<S, 1>([&](int) { return score; });
        return {score, sum > S(0) ? S(1) / sum : S(0)};
    }
    const S score = filled ? value : S(0);
    if (!problem.normalize) return {score, S(1)};
    S sum = 0;
    for (int slot = 0; slot < problem.top_k; ++slot) sum += warp_from(score, slot);
    return {score, S(1) / (sum + S(sigmoid_epsilon))};
}

}  // namespace fivedp
