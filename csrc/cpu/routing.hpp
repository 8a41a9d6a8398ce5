// Routing of tokens to experts: scores, the k best, their weights, sums for the losses; and the gradient of all of it.
//
// One token at a time, its row in the L1 cache. Every sum over experts runs in the same lanes (64 bytes of them) and
// ends in the same tree whatever the width of a vector, every sum over slots in the order of slots, and every sum over
// tokens in whole numbers: bits depend neither on the instruction set nor on how tokens are dealt out.

// Adds round(probability / routing_unit) of every expert: adding 1.5 * 2^52 leaves the rounded number in the low bits.
template <class T>
FIVEDP_INLINE void add_probabilities(const T* scores, T factor, std::int64_t n, std::int64_t* sums) {
    constexpr double magic = 6755399441055744.0;
    std::int64_t magic_bits;
    __builtin_memcpy(&magic_bits, &magic, sizeof magic_bits);
    for (std::int64_t i = 0; i < n; ++i) {
        const double shifted = (double)(scores[i] * factor) * (1.0 / routing_unit) + magic;
        std::int64_t bits;
        __builtin_memcpy(&bits, &shifted, sizeof bits);
        sums[i] += bits - magic_bits;
    }
}

FIVEDP_INLINE void add_square(double log_sum, RoutingSums& sums) {
    if (log_sum > 1048576.0 || log_sum < -1048576.0) {
        ++sums.beyond;
        return;
    }
    const double square = log_sum * log_sum;
    const std::int64_t whole = (std::int64_t)square;
    sums.square_whole += whole;
    sums.square_fraction += (std::int64_t)((square - (double)whole) * (1.0 / routing_unit) + 0.5);
}

template <class T>
static std::int64_t routing_scratch_bytes(const RoutingProblem& problem) {
    return RoutingScratch<T>(problem, nullptr).bytes;
}

template <class T>
static void routing_forward(const RoutingProblem& problem, std::int64_t row_begin, std::int64_t row_end,
                            RoutingSums& sums, char* memory) {
    const RoutingScratch<T> scratch(problem, memory);
    const std::int64_t slots = problem.top_k;
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        if (!read_row(problem, row, scratch)) {
            sums.first_invalid = row;
            return;
        }
        const TokenRow<T> token = score_row(problem, scratch, false);
        ((T*)problem.log_sum)[row] = token.log_sum;
        add_square((double)token.log_sum, sums);
        add_probabilities(scratch.scores, token.probability_factor, token.n, sums.probabilities);
        if (problem.scores != nullptr)
            __builtin_memcpy((T*)problem.scores + row * problem.experts, scratch.scores,
                             (std::size_t)problem.experts * sizeof(T));
        if (problem.choice == RoutingChoice::none) continue;
        std::int32_t* const chosen = problem.chosen + row * slots;
        if (problem.choice == RoutingChoice::by_score) choose(problem, scratch, token.n, chosen);
        const T factor = score_slots(problem, scratch, chosen), scale = (T)problem.scale;
        T* const weights = (T*)problem.weights + row * slots;
        for (std::int64_t slot = 0; slot < slots; ++slot) {
            weights[slot] = scratch.slot_scores[slot] * factor * scale;
            if (chosen[slot] >= 0) ++sums.choices[slot * problem.experts + chosen[slot]];
        }
    }
}

// Adds the gradient of the weights to d_logits, with u the gradient of a weight (0 where the pair was dropped), S the
// chosen set and c the scale:
//   softmax over S:     c v_i (u_i - sum_S v_j u_j), v the softmax over S;  0 outside S
//   softmax over all:   c p_i ([i in S] u_i - sum_S p_j u_j)
//   sigmoid, divided:   c s_i' / D (u_i - sum_S s_j u_j / D), D the sum over S;  0 outside S
//   sigmoid:            c s_i' u_i;  0 outside S
template <class T>
FIVEDP_INLINE void weights_backward(const RoutingProblem& problem, const RoutingScratch<T>& scratch, std::int64_t row,
                                    const TokenRow<T>& token, T* d_logits) {
    const std::int64_t slots = problem.top_k;
    const std::int32_t* const chosen = problem.chosen + row * slots;
    const std::int32_t* const kept = problem.kept + row * slots;
    const T* const given = (const T*)problem.d_weights + row * slots;
    const T factor = score_slots(problem, scratch, chosen), scale = (T)problem.scale;
    const auto gradient = [&](std::int64_t slot) { return kept[slot] >= 0 ? given[slot] : T(0); };
    T mean = 0;
    if (problem.normalize || !problem.sigmoid)
        for (std::int64_t slot = 0; slot < slots; ++slot) mean += scratch.slot_scores[slot] * factor * gradient(slot);
    if (!problem.normalize && !problem.sigmoid) {
        const Vec<T> all = broadcast<T>(-scale * mean);
        each_vector<T>(token.n, [&](std::int64_t i) {
            store(d_logits + i, fused(load<Vec<T>>(scratch.scores + i), all, load<Vec<T>>(d_logits + i)));
        });
        mean = 0;
    }
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        if (chosen[slot] < 0) continue;
        const T slope = problem.sigmoid ? scratch.slopes[chosen[slot]] : scratch.slot_scores[slot];
        d_logits[chosen[slot]] += scale * factor * slope * (gradient(slot) - mean);
    }
}

template <class T>
static void routing_backward(const RoutingProblem& problem, std::int64_t row_begin, std::int64_t row_end,
                             char* memory) {
    const RoutingScratch<T> scratch(problem, memory);
    T* const balance = problem.balance != nullptr ? scratch.balance : nullptr;
    if (balance != nullptr) {
        __builtin_memset(balance, 0, (std::size_t)scratch.expert_row * sizeof(T));
        __builtin_memcpy(balance, problem.balance, (std::size_t)problem.experts * sizeof(T));
    }
    for (std::int64_t row = row_begin; row < row_end; ++row) {
        read_row(problem, row, scratch);
        const TokenRow<T> token = score_row(problem, scratch, true);
        T* const d_logits = scratch.keys;
        each_vector<T>(token.n, [&](std::int64_t i) { store(d_logits + i, Vec<T>{}); });
        if (balance != nullptr) {
            // q the probabilities, b the derivative by them: q_i (b_i - sum_j b_j q_j), with s_i' / sum_j s_j in place
            // of the first q_i for sigmoids.
            const Vec<T> factor = broadcast<T>(token.probability_factor);
            const T* const slopes = problem.sigmoid ? scratch.slopes : scratch.scores;
            const Vec<T> mean = broadcast<T>(row_sum<T>(token.n, [&](std::int64_t i) {
                return load<Vec<T>>(balance + i) * (load<Vec<T>>(scratch.scores + i) * factor);
            }));
            each_vector<T>(token.n, [&](std::int64_t i) {
                store(d_logits + i, load<Vec<T>>(slopes + i) * factor * (load<Vec<T>>(balance + i) - mean));
            });
        }
        weights_backward(problem, scratch, row, token, d_logits);
        if (problem.z_factor != 0) {
            const T* powers = scratch.scores;
            T factor = (T)problem.z_factor * ((const T*)problem.log_sum)[row];
            if (problem.sigmoid) {
                exponentials(scratch.logits, token.n, token.highest, scratch.scores);
                factor = factor * token.softmax_inverse;
            }
            each_vector<T>(token.n, [&](std::int64_t i) {
                store(d_logits + i, fused(load<Vec<T>>(powers + i), broadcast<T>(factor), load<Vec<T>>(d_logits + i)));
            });
        }
        __builtin_memcpy((T*)problem.d_logits + row * problem.experts, d_logits,
                         (std::size_t)problem.experts * sizeof(T));
    }
}
