// A token's row of logits and what it gives: softmax or sigmoid scores, the choice of its experts, their scores.

// Memory of a thread: rows of experts, of slots and of groups, each in whole blocks with a block to read beyond.
template <class T>
struct RoutingScratch {
    using Index = IndexOf<T>;
    static constexpr std::int64_t block = routing_lanes<T>;
    std::int64_t expert_row, slot_row, group_row;
    T *logits, *scores, *slopes, *keys, *balance;  // rows of experts
    T *slot_logits, *slot_scores, *group_scores;
    Candidates<T> candidates;
    std::int32_t* group_order;
    std::int64_t bytes;

    RoutingScratch(const RoutingProblem& problem, char* memory) {
        expert_row = whole_blocks(problem.experts, block) + block;
        slot_row = whole_blocks(problem.top_k, block) + block;
        group_row = whole_blocks(problem.groups, block) + block;
        char* next = memory;
        const auto take = [&](std::int64_t elements) {
            T* const result = (T*)next;
            next += elements * (std::int64_t)sizeof(T);
            return result;
        };
        logits = take(expert_row);
        scores = take(expert_row);
        slopes = take(expert_row);
        keys = take(expert_row);
        balance = take(expert_row);
        slot_logits = take(slot_row);
        slot_scores = take(slot_row);
        group_scores = take(group_row);
        group_order = (std::int32_t*)take(group_row);
        // At most the experts, or the groups, of which there are no more.
        candidates.keys = take(expert_row);
        candidates.names = (Index*)take(expert_row);
        candidates.ranks = (Index*)take(expert_row);
        candidates.sorted = (std::int32_t*)take(expert_row);
        bytes = next - memory;
    }
};

// What one row of logits gives, in the scratch: softmax or sigmoid scores, and what the losses need.
template <class T>
struct TokenRow {
    std::int64_t n;     // experts in whole blocks; logits beyond are minus infinity, scores 0
    T log_sum;          // of the softmax
    T softmax_inverse;  // exp(z - highest) times this is the softmax
    T highest;
    T probability_factor;  // a score times this is what the balance loss takes for a probability
};

// Reads a row of logits; false where one is not finite.
template <class T>
FIVEDP_INLINE bool read_row(const RoutingProblem& problem, std::int64_t row, const RoutingScratch<T>& scratch) {
    const std::int64_t experts = problem.experts, n = whole_blocks(experts, routing_lanes<T>);
    const char* const from = problem.logits + row * problem.row_stride;
    T* const logits = scratch.logits;
    if (problem.type != ElementType::bf16) {
        __builtin_memcpy(logits, from, (std::size_t)experts * sizeof(T));
    } else {
        for (std::int64_t i = 0; i < experts; ++i) logits[i] = element<T, std::uint16_t>(from + 2 * i);
    }
    for (std::int64_t i = experts; i < n; ++i) logits[i] = T(0);
    Vec<T> zeros{};  // infinity and NaN times 0 are NaN
    each_vector<T>(n, [&](std::int64_t i) { zeros = zeros + load<Vec<T>>(logits + i) * Vec<T>{}; });
    for (std::int64_t i = experts; i < n; ++i) logits[i] = no_number<T>;
    return lanes_at_least<T>(zeros, Vec<T>{}) == (1u << lanes<T>)-1;
}

// Sigmoid scores of a row and, where `slopes` is given, their derivatives, both from exp(-|z|) so that none cancels;
// returns the sum of the scores.
template <class T>
FIVEDP_INLINE T sigmoids(const T* logits, std::int64_t n, T* scores, T* slopes) {
    const Vec<T> one = broadcast<T>(T(1));
    return row_sum<T>(n, [&](std::int64_t i) {
        const Vec<T> z = load<Vec<T>>(logits + i);
        const Vec<T> power = exp_of<T>(z > Vec<T>{} ? -z : z), inverse = one / (one + power);
        const Vec<T> score = z >= Vec<T>{} ? inverse : power * inverse;
        store(scores + i, score);
        if (slopes != nullptr) store(slopes + i, power * inverse * inverse);
        return score;
    });
}

// Added to a sum of sigmoids before it divides.
static constexpr double sigmoid_epsilon = 1e-20;

template <class T>
FIVEDP_INLINE TokenRow<T> score_row(const RoutingProblem& problem, const RoutingScratch<T>& scratch, bool with_slopes) {
    TokenRow<T> token{};
    token.n = whole_blocks(problem.experts, routing_lanes<T>);
    token.highest = row_max(scratch.logits, token.n);
    const T sum = exponentials(scratch.logits, token.n, token.highest, scratch.scores);
    token.softmax_inverse = T(1) / sum;
    token.log_sum = (T)((double)token.highest + log_of((double)sum));
    if (problem.sigmoid) {
        const T total = sigmoids(scratch.logits, token.n, scratch.scores, with_slopes ? scratch.slopes : nullptr);
        token.probability_factor = T(1) / (total + (T)sigmoid_epsilon);
    } else {
        const Vec<T> inverse = broadcast<T>(token.softmax_inverse);
        each_vector<T>(token.n,
                       [&](std::int64_t i) { store(scratch.scores + i, load<Vec<T>>(scratch.scores + i) * inverse); });
        token.probability_factor = T(1);
    }
    return token;
}

// The k best experts of a row. Without bias and groups the logits themselves are compared: where scores are so close,
// or so small, that they round to one number, logits still tell them apart.
template <class T>
FIVEDP_INLINE void choose(const RoutingProblem& problem, const RoutingScratch<T>& scratch, std::int64_t n,
                          std::int32_t* chosen) {
    const std::int64_t experts = problem.experts, groups = problem.groups, size = experts / groups;
    T* const keys = scratch.keys;
    if (problem.bias == nullptr && groups == 1)
        return best_of<T>(scratch.logits, n, problem.top_k, scratch.candidates, chosen);
    const T* const bias = (const T*)problem.bias;
    for (std::int64_t i = 0; i < experts; ++i)
        keys[i] = bias != nullptr ? scratch.scores[i] + bias[i] : scratch.scores[i];
    for (std::int64_t i = experts; i < n; ++i) keys[i] = no_number<T>;
    if (groups > 1) {
        const std::int64_t padded = whole_blocks(groups, routing_lanes<T>);
        T* const sums = scratch.group_scores;
        for (std::int64_t g = 0; g < groups; ++g) sums[g] = best_two(keys, g * size, (g + 1) * size);
        for (std::int64_t g = groups; g < padded; ++g) sums[g] = no_number<T>;
        best_of<T>(sums, padded, groups, scratch.candidates, scratch.group_order);
        const T masked = problem.zero_mask ? T(0) : no_number<T>;
        for (std::int64_t place = problem.top_groups; place < groups; ++place) {
            T* const group = keys + scratch.group_order[place] * size;
            for (std::int64_t i = 0; i < size; ++i) group[i] = masked;
        }
    }
    best_of<T>(keys, n, problem.top_k, scratch.candidates, chosen);
}

// The scores of the chosen experts, in slot_scores (0 in empty slots): of a softmax over them where weights are
// normalised, which is the same as dividing the softmax over all by its sum. Returns what they are multiplied by to be
// weights, but for the scale.
template <class T>
FIVEDP_INLINE T score_slots(const RoutingProblem& problem, const RoutingScratch<T>& scratch,
                            const std::int32_t* chosen) {
    const std::int64_t slots = problem.top_k, n = whole_blocks(slots, routing_lanes<T>);
    if (problem.normalize && !problem.sigmoid) {
        T* const logits = scratch.slot_logits;
        for (std::int64_t slot = 0; slot < slots; ++slot)
            logits[slot] = chosen[slot] >= 0 ? scratch.logits[chosen[slot]] : no_number<T>;
        for (std::int64_t slot = slots; slot < n; ++slot) logits[slot] = no_number<T>;
        const T highest = row_max(logits, n);
        // A token that no expert has taken: minus infinity less 0 stays what it is.
        const T sum = exponentials(logits, n, highest == no_number<T> ? T(0) : highest, scratch.slot_scores);
        return sum > T(0) ? T(1) / sum : T(0);
    }
    T sum = 0;
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        scratch.slot_scores[slot] = chosen[slot] >= 0 ? scratch.scores[chosen[slot]] : T(0);
        sum += scratch.slot_scores[slot];
    }
    return problem.normalize ? T(1) / (sum + (T)sigmoid_epsilon) : T(1);
}
