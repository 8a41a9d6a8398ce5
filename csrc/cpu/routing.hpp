// Routing of tokens to experts: scores, the k best, their weights, sums for the losses; and the gradient of all of it.
//
// One token at a time, its row in the L1 cache. Every sum over experts runs in the same lanes (64 bytes of them) and
// ends in the same tree whatever the width of a vector, every sum over slots in the order of slots, and every sum over
// tokens in whole numbers: bits depend neither on the instruction set nor on how tokens are dealt out.

// x < y ? x : y, lane by lane.
template <class T>
FIVEDP_INLINE Vec<T> smaller(Vec<T> x, Vec<T> y) {
    return x < y ? x : y;
}

// The lanes in which not x <= y, as bits.
template <class T>
FIVEDP_INLINE std::uint32_t lanes_above(Vec<T> x, Vec<T> y) {
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ);
    if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_NLE_UQ);
#elif FIVEDP_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
        return (std::uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_NLE_UQ));
    if constexpr (sizeof(T) == 8)
        return (std::uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, (__m256d)y, _CMP_NLE_UQ));
#else
    std::uint32_t bits = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) bits |= (std::uint32_t) !(x[lane] <= y[lane]) << lane;
    return bits;
#endif
}

// exp(x) for x <= 0; 0 below the smallest normal number. 2^t with t = x / log(2) rounded, times 1 + what was rounded
// off.
template <class T>
FIVEDP_INLINE Vec<T> exp_of(Vec<T> x) {
    const Vec<T> high = broadcast<T>(T(1.4426950408889634074));
    const Vec<T> low = broadcast<T>(sizeof(T) == 4 ? T(1.9259629911266175e-8) : T(2.0355273740931033e-17));
    x = larger<T>(x, broadcast<T>(T(-10000)));  // minus infinity has no rounding error to speak of
    const Vec<T> t = x * high;
    const Vec<T> rest = fused(x, low, fused(x, high, -t));
    const Vec<T> power = exp2<T>(t);
    return fused(power * rest, broadcast<T>(T(0.69314718055994530942)), power);
}

// log(x) for x >= 1: with x = 2^n m, m from sqrt(1/2) to sqrt(2), n log(2) + 2 artanh((m - 1) / (m + 1)).
FIVEDP_INLINE double log_of(double x) {
    std::int64_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    double n = (double)((bits >> 52) - 1023);
    bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
    double m;
    __builtin_memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) {
        m *= 0.5;
        n += 1;
    }
    const double s = (m - 1) / (m + 1), square = s * s;
    double sum = 0;  // of square^i / (2 i + 1), i from 1
#pragma GCC unroll 11
    for (int i = 11; i >= 1; --i) sum = (sum + 1.0 / (2 * i + 1)) * square;
    return n * 0.69314718055994530942 + (2 * s + 2 * s * sum);
}

// Calls work(i) for every vector of a row of n elements, n a multiple of the lanes of sums.
template <class T, class Work>
FIVEDP_INLINE void each_vector(std::int64_t n, const Work& work) {
    for (std::int64_t i = 0; i < n; i += lanes<T>) work(i);
}

// The sum over i of term(i), the vector at element i of a row.
template <class T, class Term>
FIVEDP_INLINE T row_sum(std::int64_t n, const Term& term) {
    constexpr int parts = 64 / FIVEDP_VECTOR_BYTES;
    Vec<T> sums[parts] = {};
    for (std::int64_t i = 0; i < n; i += routing_lanes<T>)
        for (int part = 0; part < parts; ++part) sums[part] = sums[part] + term(i + part * lanes<T>);
    T lane[routing_lanes<T>];
    __builtin_memcpy(lane, sums, sizeof lane);
    for (std::int64_t half = routing_lanes<T> / 2; half > 0; half /= 2)
        for (std::int64_t i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
    return lane[0];
}

template <class T>
FIVEDP_INLINE T row_max(const T* row, std::int64_t n) {
    Vec<T> highest = load<Vec<T>>(row);
    each_vector<T>(n, [&](std::int64_t i) { highest = larger<T>(load<Vec<T>>(row + i), highest); });
    T result = highest[0];
    for (int lane = 1; lane < lanes<T>; ++lane) result = highest[lane] > result ? highest[lane] : result;
    return result;
}

// Writes exp(z - highest) of a row that is filled up with minus infinity, and returns the sum.
template <class T>
FIVEDP_INLINE T exponentials(const T* z, std::int64_t n, T highest, T* to) {
    return row_sum<T>(n, [&](std::int64_t i) {
        const Vec<T> value = exp_of<T>(load<Vec<T>>(z + i) - broadcast<T>(highest));
        store(to + i, value);
        return value;
    });
}

template <class T>
static constexpr T no_number = T(-__builtin_inf());

static constexpr std::int64_t whole_blocks(std::int64_t n, std::int64_t block) {
    return (n + block - 1) / block * block;
}

// Memory of a thread: rows of experts, of slots and of groups, each in whole blocks with a block to read beyond.
template <class T>
struct RoutingScratch {
    using Index = IndexOf<T>;
    static constexpr std::int64_t block = routing_lanes<T>;
    std::int64_t expert_row, slot_row, group_row;
    T *logits, *scores, *slopes, *keys, *balance;  // rows of experts
    T *slot_logits, *slot_scores, *group_scores;
    T* best_keys;  // the list of the best: see BestList
    Index* best_names;
    bool* group_chosen;
    std::int64_t bytes;

    RoutingScratch(const RoutingProblem& problem, char* memory) {
        expert_row = whole_blocks(problem.experts, block) + block;
        slot_row = whole_blocks(problem.top_k, block) + block;
        group_row = whole_blocks(problem.groups, block) + block;
        const std::int64_t list = (slot_row > group_row ? slot_row : group_row) + block;
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
        best_keys = take(list) + block;
        best_names = (Index*)take(list) + block;
        group_chosen = (bool*)take(group_row);
        bytes = next - memory;
    }
};

// The `count` highest keys met so far, the highest first, equal ones in the order in which they came. The place before
// the first holds infinity, so that nothing moves beyond it; places not yet filled hold NaN, which is above nothing.
template <class T>
struct BestList {
    using Index = IndexOf<T>;
    T* keys;
    Index* names;
    std::int64_t count, length;

    BestList(T* keys_of_list, Index* names_of_list, std::int64_t n)
        : keys(keys_of_list), names(names_of_list), count(n), length(whole_blocks(n, lanes<T>)) {
        keys[-1] = T(__builtin_inf());
        names[-1] = -1;
        for (std::int64_t i = 0; i < length; ++i) keys[i] = T(__builtin_nan(""));
    }

    // Every place compares and takes its own key, the new one, or that of the place before it: no branch to guess.
    void insert(T key, Index name) {
        const Vec<T> new_key = broadcast<T>(key);
        const Vec<Index> new_name = name - Vec<Index>{};
        for (std::int64_t i = length - lanes<T>; i >= 0; i -= lanes<T>) {
            const Vec<T> here = load<Vec<T>>(keys + i), before = load<Vec<T>>(keys + i - 1);
            const Vec<Index> name_here = load<Vec<Index>>(names + i), name_before = load<Vec<Index>>(names + i - 1);
            const auto stays = here >= new_key, stays_before = before >= new_key;
            store(keys + i, stays ? here : stays_before ? new_key : before);
            store(names + i, stays ? name_here : stays_before ? new_name : name_before);
        }
    }

    // Meets row[begin] .. row[end - 1], named by their places. A vector may be read beyond the end.
    void meet(const T* row, std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; i += lanes<T>) {
            std::uint32_t above = lanes_above<T>(load<Vec<T>>(row + i), broadcast<T>(keys[count - 1]));
            if (end - i < lanes<T>) above &= (1u << (end - i)) - 1;
            for (; above != 0; above &= above - 1) {
                const int lane = __builtin_ctz(above);
                if (!(row[i + lane] <= keys[count - 1])) insert(row[i + lane], (Index)(i + lane));
            }
        }
    }
};

// The sum of the two highest of row[begin] .. row[end - 1], or the one there is.
template <class T>
FIVEDP_INLINE T best_two(const T* row, std::int64_t begin, std::int64_t end) {
    if (end - begin == 1) return row[begin];
    T first[lanes<T>], second[lanes<T>], tail[lanes<T>];
    Vec<T> high = broadcast<T>(no_number<T>), low = high;
    const auto meet = [&](Vec<T> x) {
        low = larger<T>(low, smaller<T>(high, x));
        high = larger<T>(high, x);
    };
    const std::int64_t whole = begin + (end - begin) / lanes<T> * lanes<T>;
    for (std::int64_t i = begin; i < whole; i += lanes<T>) meet(load<Vec<T>>(row + i));
    if (whole < end) {
        for (int lane = 0; lane < lanes<T>; ++lane) tail[lane] = whole + lane < end ? row[whole + lane] : no_number<T>;
        meet(load<Vec<T>>(tail));
    }
    store(first, high);
    store(second, low);
#pragma GCC unroll 4
    for (int half = lanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) {
            const T lower = first[i] < first[i + half] ? first[i] : first[i + half];
            first[i] = first[i] > first[i + half] ? first[i] : first[i + half];
            second[i] = second[i] > second[i + half] ? second[i] : second[i + half];
            second[i] = second[i] > lower ? second[i] : lower;
        }
    return first[0] + second[0];
}

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
    if constexpr (sizeof(T) == 8) {
        __builtin_memcpy(logits, from, (std::size_t)experts * sizeof(T));
    } else if (problem.type == ElementType::f32) {
        __builtin_memcpy(logits, from, (std::size_t)experts * sizeof(T));
    } else {
        for (std::int64_t i = 0; i < experts; ++i) logits[i] = element<T, std::uint16_t>(from + 2 * i);
    }
    for (std::int64_t i = experts; i < n; ++i) logits[i] = T(0);
    const T zero = row_sum<T>(n, [&](std::int64_t i) { return load<Vec<T>>(logits + i) * Vec<T>{}; });
    for (std::int64_t i = experts; i < n; ++i) logits[i] = no_number<T>;
    return zero == T(0);  // infinity and NaN times 0 are NaN
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
FIVEDP_INLINE void choose(const RoutingProblem& problem, const RoutingScratch<T>& scratch, std::int32_t* chosen) {
    const std::int64_t groups = problem.groups, size = problem.experts / groups;
    const T* keys = scratch.logits;
    if (problem.bias != nullptr || groups > 1) {
        const T* const bias = (const T*)problem.bias;
        for (std::int64_t i = 0; i < problem.experts; ++i)
            scratch.keys[i] = bias != nullptr ? scratch.scores[i] + bias[i] : scratch.scores[i];
        keys = scratch.keys;
    }
    bool* const reached = scratch.group_chosen;
    reached[0] = true;
    if (groups > 1) {
        for (std::int64_t g = 0; g < groups; ++g) {
            scratch.group_scores[g] = best_two(keys, g * size, (g + 1) * size);
            reached[g] = false;
        }
        BestList<T> best(scratch.best_keys, scratch.best_names, problem.top_groups);
        best.meet(scratch.group_scores, 0, groups);
        for (std::int64_t i = 0; i < problem.top_groups; ++i) reached[best.names[i]] = true;
    }
    BestList<T> best(scratch.best_keys, scratch.best_names, problem.top_k);
    for (std::int64_t g = 0; g < groups; ++g) {
        if (!reached[g] && !problem.zero_mask) continue;
        if (!reached[g])
            for (std::int64_t i = g * size; i < (g + 1) * size; ++i) scratch.keys[i] = T(0);
        best.meet(keys, g * size, (g + 1) * size);
    }
    for (std::int64_t slot = 0; slot < problem.top_k; ++slot) chosen[slot] = (std::int32_t)best.names[slot];
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
        if (problem.choice == RoutingChoice::by_score) choose(problem, scratch, chosen);
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
