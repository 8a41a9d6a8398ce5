// Rows of tokens on their way from memory to what attention's products take, and the sums back.
//
// A unit is a number, or a pair of bfloat16 along the index that is summed (see attention_products.hpp), so rows are
// staged in two ways, which are one where a unit is a number:
//
//     along features    (tokens, units of features), for sums over features: pairs as they lie in memory
//     along tokens      (units of tokens, features), for sums over keys or over queries: two rows interleaved
//
// What the kernel computes itself and multiplies, weights and the derivatives of logits, is rounded to bfloat16 where
// units are pairs, as its inputs are: once for each product, and never what is summed of it.

// Rows of transposed keys: a multiple of 8, for they are transposed 8 x 8.
static constexpr std::int64_t transposed_width = (key_tile + 7) / 8 * 8;

// From one staged row to the next: a multiple of 8, for they are transposed 8 x 8.
FIVEDP_INLINE std::int64_t staged_length(const AttentionProblem& problem) {
    return round_up(problem.size > problem.v_size ? problem.size : problem.v_size, 8);
}

// One token's row, widened, and zeros after it.
template <class T, class Source>
FIVEDP_INLINE void widen_row(const char* from, std::int64_t size, T* to, std::int64_t length) {
    for (std::int64_t i = 0; i < size; ++i) to[i] = element<T, Source>(from + i * (std::int64_t)sizeof(Source));
    for (std::int64_t i = size; i < length; ++i) to[i] = 0;
}

// n pairs of one token's bfloat16 (low) and the next one's (high), or zeros where there is no next one.
FIVEDP_INLINE void interleave(const char* low, const char* high, std::int64_t n, std::uint32_t* __restrict__ to) {
    const auto half = [](const char* from, std::int64_t i) -> std::uint32_t {
        return element<std::uint16_t, std::uint16_t>(from + 2 * i);
    };
    if (high == nullptr)
        for (std::int64_t i = 0; i < n; ++i) to[i] = half(low, i);
    else
        for (std::int64_t i = 0; i < n; ++i) to[i] = half(low, i) | half(high, i) << 16;
}

// One token's row in units along its features, and zeros after them up to `length` units. Pairs are taken as they lie.
template <class E>
FIVEDP_INLINE void stage_row(ElementType type, const char* from, std::int64_t size, typename E::Unit* to,
                             std::int64_t length) {
    using T = typename E::Acc;
    if constexpr (E::unit_k == 2) {
        widen_row<std::uint32_t, std::uint32_t>(from, size / 2, to, length);
        if (size % 2 != 0) to[size / 2] = element<std::uint16_t, std::uint16_t>(from + 2 * (size - 1));
    } else if constexpr (sizeof(T) == 8) {
        widen_row<T, double>(from, size, to, length);
    } else if (type == ElementType::bf16) {
        widen_row<T, std::uint16_t>(from, size, to, length);
    } else {
        widen_row<T, float>(from, size, to, length);
    }
}

// Rows of keys or values of one tile in units along tokens, `row_length` apart.
template <class E>
FIVEDP_INLINE void stage_keys(const AttentionProblem& problem, const TokenView& view, std::int64_t batch,
                              std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t size,
                              typename E::Unit* rows, std::int64_t row_length) {
    const char* from = view.data + batch * view.batch_stride + head * view.head_stride + first * view.token_stride;
    for (std::int64_t i = 0; i < count; i += E::unit_k, rows += row_length) {
        const char* const row = from + i * view.token_stride;
        if constexpr (E::unit_k == 2)
            interleave(row, i + 1 < count ? row + view.token_stride : nullptr, size, rows);
        else
            stage_row<E>(problem.type, row, size, rows, row_length);
    }
}

// Whether rows of units hold NaN or infinity.
template <class E>
FIVEDP_INLINE bool has_nonfinite(const typename E::Unit* rows, std::int64_t count, std::int64_t length,
                                 std::int64_t row_length) {
    using Unit = typename E::Unit;
    using Bits = IndexOf<typename E::Acc>;
    constexpr Bits exponent = sizeof(Unit) == 4 ? (Bits)0x7f800000 : (Bits)0x7ff0000000000000;
    const auto nonfinite = [](auto x) {
        if constexpr (E::unit_k == 2)
            return ((x & exponent) == exponent) | ((x & (exponent >> 16)) == (exponent >> 16));
        else
            return (x & exponent) == exponent;
    };
    Vec<Bits> found = {};
    bool any = false;
    for (std::int64_t r = 0; r < count; ++r) {
        const Unit* const row = rows + r * row_length;
        std::int64_t i = 0;
        for (; i + lanes<Unit> <= length; i += lanes<Unit>) found |= nonfinite(load<Vec<Bits>>(row + i));
        for (; i < length; ++i) any |= nonfinite(element<Bits, Bits>((const char*)(row + i)));
    }
    for (int lane = 0; lane < lanes<Unit>; ++lane) any |= found[lane] != 0;
    return any;
}

// (n, rows) to panels of its columns. Whole vectors are copied: what one writes too much the next one mends.
template <class Unit>
FIVEDP_INLINE void split(const Unit* from, std::int64_t from_step, std::int64_t n, std::int64_t rows, std::int64_t step,
                         std::int64_t room, Unit* panels) {
    for (std::int64_t row = 0; row < rows; row += step) {
        Unit* to = panels + row / step * room * panel_rows;
        for (std::int64_t i = 0; i < n; ++i, to += panel_rows)
            for (std::int64_t r = 0; r < step; r += lanes<Unit>)
                store(to + r, load<Vec<Unit>>(from + i * from_step + row + r));
    }
}

// Panels whose rows are keys (or values), for products with queries (or gradients) over features. `transposed` is room
// for (units of size, transposed_width).
template <class E>
FIVEDP_INLINE void panels_of_keys(const AttentionProblem& problem, const TokenView& view, std::int64_t batch,
                                  std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t size,
                                  typename E::Unit* transposed, typename E::Unit* panels) {
    using Unit = typename E::Unit;
    const char* from = view.data + batch * view.batch_stride + head * view.head_stride + first * view.token_stride;
    if constexpr (E::unit_k == 2) {
        transpose<Unit, Unit>(from, view.token_stride, count, size / 2, transposed, transposed_width);
        if (size % 2 != 0)
            for (std::int64_t j = 0; j < count; ++j)
                transposed[size / 2 * transposed_width + j] =
                    element<std::uint16_t, std::uint16_t>(from + j * view.token_stride + 2 * (size - 1));
    } else if constexpr (sizeof(Unit) == 8) {
        transpose<Unit, double>(from, view.token_stride, count, size, transposed, transposed_width);
    } else if (problem.type == ElementType::bf16) {
        transpose<Unit, std::uint16_t>(from, view.token_stride, count, size, transposed, transposed_width);
    } else {
        transpose<Unit, float>(from, view.token_stride, count, size, transposed, transposed_width);
    }
    split(transposed, transposed_width, units<E>(size), count, panel_rows, units<E>(size), panels);
}

// Panels whose rows are features, for sums over keys, from rows in units along tokens.
template <class E>
FIVEDP_INLINE void panels_of_features(const typename E::Unit* rows, std::int64_t row_length, std::int64_t count,
                                      std::int64_t size, typename E::Unit* panels) {
    split(rows, row_length, units<E>(count), size, feature_step(size), key_units<E>, panels);
}

// Where row `row` of a range is: its query and its head.
struct RowAt {
    std::int64_t query, head;
};
FIVEDP_INLINE RowAt row_at(const AttentionProblem& problem, const AttentionRange& range, std::int64_t row) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    return {range.query_begin + row / group, range.kv_head * group + row % group};
}

// Rows [first, first + rows) of a range as (units of size, lanes); lanes without a row are zero. Numbers are scaled,
// pairs are not. `staged` is left with the rows as they are, along features, `row_length` apart.
template <class E>
FIVEDP_INLINE void to_lanes(const AttentionProblem& problem, ElementType type, const TokenView& view, std::int64_t size,
                            const AttentionRange& range, std::int64_t first, std::int64_t rows, typename E::Acc scale,
                            typename E::Unit* staged, std::int64_t row_length, typename E::Unit* to) {
    using Unit = typename E::Unit;
    constexpr std::int64_t width = group_lanes<Unit>;
    const std::int64_t count = units<E>(size);
    for (std::int64_t r = 0; r < rows; ++r) {
        const RowAt at = row_at(problem, range, first + r);
        stage_row<E>(
            type,
            view.data + range.batch * view.batch_stride + at.query * view.token_stride + at.head * view.head_stride,
            size, staged + r * row_length, count);
    }
    for (std::int64_t lane = 0; lane < query_tile; lane += width) {
        const std::int64_t left = rows - lane;
        const std::int64_t in_group = left < 0 ? 0 : left < width ? left : width;
        Unit* const group = to + lane * count;
        transpose<Unit, Unit>((const char*)(staged + lane * row_length), row_length * (std::int64_t)sizeof(Unit),
                              in_group, count, group, width);
        if (in_group < width)
            for (std::int64_t i = 0; i < count; ++i)
                for (std::int64_t r = in_group; r < width; ++r) group[i * width + r] = 0;
        if constexpr (!scaled_after<E>)
            if (scale != 1)
                for (std::int64_t i = 0; i < count * width; ++i) group[i] *= scale;
    }
}

// And back: (size, lanes) to rows, of the type of sums.
template <class T>
FIVEDP_INLINE void from_lanes(const AttentionProblem& problem, const TokenView& view, std::int64_t size,
                              const AttentionRange& range, std::int64_t first, std::int64_t rows, const T* lanes_of,
                              T* staged, std::int64_t row_length) {
    constexpr std::int64_t width = group_lanes<T>;
    for (std::int64_t lane = 0; lane < query_tile; lane += width)
        transpose<T, T>((const char*)(lanes_of + lane * size), width * (std::int64_t)sizeof(T), size, width,
                        staged + lane * row_length, row_length);
    for (std::int64_t r = 0; r < rows; ++r) {
        const RowAt at = row_at(problem, range, first + r);
        T* const to = (T*)(view.data + range.batch * view.batch_stride + at.query * view.token_stride +
                           at.head * view.head_stride);
        for (std::int64_t i = 0; i < size; ++i) to[i] = staged[r * row_length + i];
    }
}

// (batch, queries, heads, size) contiguous, of the type of sums; how they are packed.
template <class T>
FIVEDP_INLINE TokenView sums_view(const AttentionProblem& problem, void* data, std::int64_t size) {
    const std::int64_t head = size * (std::int64_t)sizeof(T), token = problem.heads * head;
    return {(char*)data, problem.n_queries * token, token, head};
}
template <class T>
static constexpr ElementType sums_type = sizeof(T) == 8 ? ElementType::f64 : ElementType::f32;
template <class T>
using SumsEngine = std::conditional_t<sizeof(T) == 8, F64Engine, F32Engine>;

// Rows of queries, staged along features, to columns of units along tokens.
template <class E>
FIVEDP_INLINE void rows_to_columns(const typename E::Unit* staged, std::int64_t row_length, std::int64_t rows,
                                   std::int64_t size, typename E::Unit* columns) {
    using Unit = typename E::Unit;
    constexpr std::int64_t width = group_lanes<Unit>, room = query_tile / E::unit_k;
    if constexpr (E::unit_k == 1) {
        for (std::int64_t r = 0; r < rows; ++r) to_columns<Unit>(staged + r * row_length, r, size, room, columns);
    } else {
        for (std::int64_t r = 0; r < rows; r += 2)
            for (std::int64_t i = 0; i < size; i += width) {
                const char* const low = (const char*)(staged + r * row_length) + 2 * i;
                const char* const high = (const char*)(staged + (r + 1) * row_length) + 2 * i;
                Unit* const to = columns + i * room + r / 2 * width;
                const std::int64_t n = size - i < width ? size - i : width;
                interleave(low, r + 1 < rows ? high : nullptr, n, to);
                for (std::int64_t c = n; c < width; ++c) to[c] = 0;
            }
    }
}

#ifdef FIVEDP_BF16_PAIRS
// Two vectors rounded to bfloat16, the nearest, ties to even: lane by lane as the halves of one vector of pairs, or one
// vector after the other.
FIVEDP_INLINE Vec<std::uint32_t> rounded_pairs(Vec<float> low, Vec<float> high) {
#ifdef __AVX512BF16__
    const __m512i from_each = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec<std::uint32_t>)_mm512_permutexvar_epi16(from_each,
                                                        (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
    Vec<std::uint32_t> pairs;
    for (int lane = 0; lane < lanes<float>; ++lane)
        pairs[lane] = round_to_bf16(low[lane]) | (std::uint32_t)round_to_bf16(high[lane]) << 16;
    return pairs;
#endif
}
FIVEDP_INLINE Vec<std::uint32_t> rounded_row(Vec<float> first, Vec<float> second) {
#ifdef __AVX512BF16__
    return (Vec<std::uint32_t>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    Vec<std::uint32_t> pairs;
    for (int lane = 0; lane < lanes<float>; ++lane) {
        const Vec<float>& from = lane < lanes<float> / 2 ? first : second;
        const int at = 2 * lane % lanes<float>;
        pairs[lane] = round_to_bf16(from[at]) | (std::uint32_t)round_to_bf16(from[at + 1]) << 16;
    }
    return pairs;
#endif
}
#endif

// The keys of a tile that a tile of queries is multiplied with.
struct KeyRange {
    std::int64_t begin, end;
};

// Where vector v of row i is, in an array of n rows.
template <class T>
FIVEDP_INLINE std::int64_t vector_at(int v, std::int64_t n, std::int64_t i) {
    return (v / lane_vectors * n + i) * group_lanes<T> + v % lane_vectors * lanes<T>;
}

// `values` (keys, lanes) in units along keys, for sums over keys: as they are or, rounded, in `pairs`, which is
// (key pairs, lanes).
template <class E>
FIVEDP_INLINE const typename E::Unit* along_keys(const typename E::Acc* values, KeyRange keys, int vectors,
                                                 typename E::Unit* pairs) {
    if constexpr (E::unit_k == 1) {
        return values;
    } else {
        using V = Vec<typename E::Acc>;
        using T = typename E::Acc;
        for (int v = 0; v < vectors; ++v)
            for (std::int64_t j = keys.begin; j < keys.end; j += 2) {
                const V low = load<V>(values + vector_at<T>(v, key_tile, j));
                const V high = j + 1 < keys.end ? load<V>(values + vector_at<T>(v, key_tile, j + 1)) : V{};
                store(pairs + vector_at<T>(v, key_units<E>, j / 2), rounded_pairs(low, high));
            }
        return pairs;
    }
}

// The same in units along lanes, for sums over the first `rows` lanes; `pairs` is (keys, lane pairs).
template <class E>
FIVEDP_INLINE const typename E::Unit* along_lanes(const typename E::Acc* values, KeyRange keys, std::int64_t rows,
                                                  typename E::Unit* pairs) {
    if constexpr (E::unit_k == 1) {
        return values;
    } else {
        using V = Vec<typename E::Acc>;
        using T = typename E::Acc;
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
            typename E::Unit* const row = pairs + j * factor_row<E>;
            const T* const from = values + j * group_lanes<T>;
            for (std::int64_t lane = 0; lane < rows; lane += 2 * lanes<T>) {
                const V second = lane + lanes<T> < rows ? load<V>(from + lane + lanes<T>) : V{};
                store(row + lane / 2, rounded_row(load<V>(from + lane), second));
            }
            if (rows % 2 != 0) row[rows / 2] &= 0xffffu;  // a lane without a row
        }
        return pairs;
    }
}
