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

// The lanes in which x >= y, as bits.
template <class T>
FIVEDP_INLINE std::uint32_t lanes_at_least(Vec<T> x, Vec<T> y) {
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
    if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask((__m512d)x, (__m512d)y, _CMP_GE_OQ);
#elif FIVEDP_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
        return (std::uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_GE_OQ));
    if constexpr (sizeof(T) == 8)
        return (std::uint32_t)_mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, (__m256d)y, _CMP_GE_OQ));
#else
    std::uint32_t bits = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) bits |= (std::uint32_t)(x[lane] >= y[lane]) << lane;
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
FIVEDP_INLINE T highest_lane(Vec<T> x) {
    T lane[lanes<T>];
    store(lane, x);
#pragma GCC unroll 4
    for (int half = lanes<T> / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}

template <class T>
FIVEDP_INLINE T row_max(const T* row, std::int64_t n) {
    Vec<T> highest = load<Vec<T>>(row);
    each_vector<T>(n, [&](std::int64_t i) { highest = larger<T>(load<Vec<T>>(row + i), highest); });
    return highest_lane<T>(highest);
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

// Room for those that may be among the best of a row.
template <class T>
struct Candidates {
    T* keys;
    IndexOf<T>*names, *ranks;
    std::int32_t* sorted;
};

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

// A key that at least k of a row of n have reached: the k-th highest of the maxima of at least 2 k columns.
template <class T>
FIVEDP_INLINE T reached_by(const T* row, std::int64_t n, std::int64_t k, T* maxima) {
    using Index = IndexOf<T>;
    const std::int64_t columns = whole_blocks(2 * k, routing_lanes<T>);
    if (2 * columns > n) return no_number<T>;
    each_vector<T>(columns, [&](std::int64_t j) {
        Vec<T> highest = load<Vec<T>>(row + j);
        for (std::int64_t i = j + columns; i < n; i += columns) highest = larger<T>(load<Vec<T>>(row + i), highest);
        store(maxima + j, highest);
    });
    Vec<T> found = broadcast<T>(no_number<T>);
    each_vector<T>(columns, [&](std::int64_t j) {
        const Vec<T> here = load<Vec<T>>(maxima + j);
        Vec<Index> as_high{};  // minus the number of columns that are
        for (std::int64_t i = 0; i < columns; ++i) as_high += (Vec<Index>)(broadcast<T>(maxima[i]) >= here);
        found = larger<T>(as_high <= -(Index)k - Vec<Index>{} ? here : found, found);
    });
    return highest_lane<T>(found);
}

// Appends the elements of a row that have reached `least`, in their order, and returns how many these are.
template <class T>
FIVEDP_INLINE std::int64_t collect(const T* row, std::int64_t n, T least, const Candidates<T>& to) {
    const Vec<T> limit = broadcast<T>(least);
    std::int64_t count = 0;
    for (std::int64_t i = 0; i < n; i += lanes<T>) {
        const Vec<T> keys = load<Vec<T>>(row + i);
        std::uint32_t found = lanes_at_least<T>(keys, limit);
#if FIVEDP_VECTOR_BYTES == 64 && defined(__AVX512F__)
        if constexpr (sizeof(T) == 4) {
            const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512i names = _mm512_add_epi32(lane, _mm512_set1_epi32((int)i));
            _mm512_storeu_ps(to.keys + count, _mm512_maskz_compress_ps((__mmask16)found, (__m512)keys));
            _mm512_storeu_si512(to.names + count, _mm512_maskz_compress_epi32((__mmask16)found, names));
        } else {
            const __m512i names = _mm512_add_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(i));
            _mm512_storeu_pd(to.keys + count, _mm512_maskz_compress_pd((__mmask8)found, (__m512d)keys));
            _mm512_storeu_si512(to.names + count, _mm512_maskz_compress_epi64((__mmask8)found, names));
        }
        count += __builtin_popcount(found);
#else
        for (; found != 0; found &= found - 1) {
            const std::int64_t place = i + __builtin_ctz(found);
            to.keys[count] = row[place];
            to.names[count++] = (IndexOf<T>)place;
        }
#endif
    }
    return count;
}

// The places of the k highest of a row, the highest first, equal ones by place. The row has k elements or more and is
// filled up with minus infinity to n, whole blocks. There is no branch to guess: all that have reached a key which k
// have reached are candidates, and how many of them come before one is its place in the result.
template <class T>
FIVEDP_INLINE void best_of(const T* row, std::int64_t n, std::int64_t k, const Candidates<T>& scratch,
                           std::int32_t* best) {
    using Index = IndexOf<T>;
    const std::int64_t count = collect(row, n, reached_by(row, n, k, scratch.keys), scratch);
    const std::int64_t padded = whole_blocks(count, lanes<T>);
    Index step[lanes<T>];
    for (int lane = 0; lane < lanes<T>; ++lane) step[lane] = lane;
    for (std::int64_t i = 0; i < padded; i += lanes<T>) {
        const Vec<T> here = load<Vec<T>>(scratch.keys + i);
        const Vec<Index> place = load<Vec<Index>>(step) + (Index)i;
        Vec<Index> before{};  // minus the number of candidates that come before
        for (std::int64_t j = 0; j < count; ++j) {
            const Vec<T> other = broadcast<T>(scratch.keys[j]);
            before += (Vec<Index>)(other > here) |
                      ((Vec<Index>)(other == here) & (Vec<Index>)((Index)j - Vec<Index>{} < place));
        }
        store(scratch.ranks + i, -before);
    }
    for (std::int64_t i = 0; i < count; ++i) scratch.sorted[scratch.ranks[i]] = (std::int32_t)scratch.names[i];
    for (std::int64_t slot = 0; slot < k; ++slot) best[slot] = scratch.sorted[slot];
}

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
