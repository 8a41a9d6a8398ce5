// A tile of queries, a block of keys, and what the mask leaves of the two; the logits of a tile.

// The positions and documents of some tokens, from the lowest to the highest.
template <class Index>
struct Span {
    Index position_low, position_high, document_low, document_high;
};

template <class Index>
FIVEDP_INLINE Span<Index> span_of(const Index* position, const Index* document, std::int64_t n) {
    Span<Index> span = {position[0], position[0], document[0], document[0]};
    for (std::int64_t i = 1; i < n; ++i) {
        if (position[i] < span.position_low) span.position_low = position[i];
        if (position[i] > span.position_high) span.position_high = position[i];
        if (document[i] < span.document_low) span.document_low = document[i];
        if (document[i] > span.document_high) span.document_high = document[i];
    }
    return span;
}

enum class Sight { none, some, all };

// How much of a tile the mask leaves. Query i sees key j where both are of one document and
//     causal: j <= i,   window w: i - j < w and, unless causal, j - i < w.
template <class Index>
FIVEDP_INLINE Sight sight(const AttentionProblem& problem, const Span<Index>& q, const Span<Index>& k) {
    const std::int64_t above_low = (std::int64_t)q.position_low - k.position_high;   // the least i - j
    const std::int64_t above_high = (std::int64_t)q.position_high - k.position_low;  // the greatest
    const std::int64_t w = problem.window;
    if (q.document_low > k.document_high || q.document_high < k.document_low) return Sight::none;
    if (problem.causal && above_high < 0) return Sight::none;
    if (w > 0 && (above_low >= w || (!problem.causal && above_high <= -w))) return Sight::none;
    const bool one_document = q.document_low == q.document_high && k.document_low == k.document_high;
    const bool all = one_document && (!problem.causal || above_low >= 0) &&
                     (w == 0 || (above_high < w && (problem.causal || above_low > -w)));
    return all ? Sight::all : Sight::some;
}

// The queries of a range as tiles of lanes: query by query, and head by head of the group within.
template <class T>
struct QueryTile {
    using Index = IndexOf<T>;
    std::int64_t rows;  // in use, at most query_tile
    int vectors;        // that hold them
    Span<Index> span;
    bool finite;  // no NaN or infinity in its rows
    Index position[query_tile], document[query_tile];
    T slope[query_tile];
};

template <class T>
FIVEDP_INLINE void describe_tile(const AttentionProblem& problem, const AttentionRange& range, std::int64_t first,
                                 std::int64_t rows, QueryTile<T>& tile) {
    using Index = IndexOf<T>;
    tile.rows = rows;
    tile.vectors = (int)((rows + lanes<T> - 1) / lanes<T>);
    tile.finite = true;
    for (std::int64_t lane = 0; lane < query_tile; ++lane) {
        const RowAt at = row_at(problem, range, first + (lane < rows ? lane : rows - 1));
        tile.position[lane] = (Index)problem.q_position[at.query];
        tile.document[lane] = problem.q_document != nullptr ? (Index)problem.q_document[at.query] : 0;
        tile.slope[lane] = problem.slopes != nullptr ? (T)problem.slopes[at.head] : T(0);
    }
    tile.span = span_of<Index>(tile.position, tile.document, rows);
}

// A block of keys: where they are, and what of them is finite.
template <class T>
struct KeyBlock {
    using Index = IndexOf<T>;
    std::int64_t count;
    Index position[key_block], document[key_block];
    Span<Index> span[4];
    bool finite[4];  // no NaN or infinity in the tile: what is masked can be multiplied by zero
};

template <class T>
FIVEDP_INLINE void describe_keys(const AttentionProblem& problem, std::int64_t first, std::int64_t count,
                                 KeyBlock<T>& block) {
    using Index = IndexOf<T>;
    block.count = count;
    for (std::int64_t i = 0; i < count; ++i) {
        block.position[i] = (Index)problem.k_position[first + i];
        block.document[i] = problem.k_document != nullptr ? (Index)problem.k_document[first + i] : 0;
    }
    for (std::int64_t tile = 0; tile * key_tile < count; ++tile) {
        const std::int64_t begin = tile * key_tile, left = count - begin;
        block.span[tile] =
            span_of<Index>(block.position + begin, block.document + begin, left < key_tile ? left : key_tile);
        block.finite[tile] = true;
    }
}

// The keys of a tile that a tile of queries may see at all, rounded outward to `key_grain`.
template <class T>
FIVEDP_INLINE KeyRange seen_keys(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                                 std::int64_t first, std::int64_t count) {
    const auto unseen = [&](std::int64_t j) {
        const IndexOf<T> position = block.position[first + j], document = block.document[first + j];
        return sight<IndexOf<T>>(problem, tile.span, {position, position, document, document}) == Sight::none;
    };
    KeyRange range = {0, count};
    while (range.begin < range.end && unseen(range.begin)) ++range.begin;
    while (range.begin < range.end && unseen(range.end - 1)) --range.end;
    range.begin = range.begin / key_grain * key_grain;
    const std::int64_t end = round_up(range.end, key_grain);
    range.end = end < count ? end : count;
    return range;
}

// log2(e), and what double leaves of it.
static constexpr double log2_of_e = 1.4426950408889634074, log2_of_e_rest = 2.0355273740931033e-17;

// The logit of one key for the lanes of vector v, in units of log(2), from the product with the scaled query.
template <class T>
FIVEDP_INLINE Vec<T> finish_logit(const AttentionProblem& problem, const QueryTile<T>& tile, int v, Vec<T> x,
                                  IndexOf<T> key_position) {
    using Index = IndexOf<T>;
    if (problem.softcap > 0) {
        const T cap = (T)(problem.softcap * log2_of_e);
        x = broadcast<T>(cap) * tanh_of<T>(x / broadcast<T>(cap));
    }
    if (problem.slopes != nullptr) {
        const Vec<Index> apart = load<Vec<Index>>(tile.position + v * lanes<T>) - broadcast<Index>(key_position);
        const Vec<T> distance = __builtin_convertvector(apart < 0 ? -apart : apart, Vec<T>);
        x = x - load<Vec<T>>(tile.slope + v * lanes<T>) * broadcast<T>((T)log2_of_e) * distance;
    }
    return x;
}

// Which lanes of vector v see a key.
template <class T>
FIVEDP_INLINE Vec<IndexOf<T>> visible(const AttentionProblem& problem, const QueryTile<T>& tile, int v,
                                      IndexOf<T> key_position, IndexOf<T> key_document) {
    using Index = IndexOf<T>;
    const Vec<Index> apart = load<Vec<Index>>(tile.position + v * lanes<T>) - broadcast<Index>(key_position);
    Vec<Index> seen = load<Vec<Index>>(tile.document + v * lanes<T>) == broadcast<Index>(key_document);
    if (problem.causal) seen &= apart >= 0;
    if (problem.window > 0) {
        constexpr std::int64_t most = sizeof(T) == 4 ? 0x7fffffff : 0x7fffffffffffffff;
        const Vec<Index> window = broadcast<Index>((Index)(problem.window < most ? problem.window : most));
        seen &= apart < window;
        if (!problem.causal) seen &= -apart < window;
    }
    return seen;
}

// Whether one lane sees a key.
template <class T>
FIVEDP_INLINE bool sees(const AttentionProblem& problem, const QueryTile<T>& tile, std::int64_t lane,
                        IndexOf<T> key_position, IndexOf<T> key_document) {
    const std::int64_t apart = (std::int64_t)tile.position[lane] - key_position;
    return tile.document[lane] == key_document && !(problem.causal && apart < 0) &&
           !(problem.window > 0 && (apart >= problem.window || (!problem.causal && -apart >= problem.window)));
}

// sums (size, lanes) = sums * factor + sum over the keys j that a lane sees of rows[j] * weights[j][lane]:
// `lane_product` with the same bits, for tiles in which 0 times a masked row would be NaN.
template <class E>
FIVEDP_NOINLINE void add_visible_keys(const AttentionProblem& problem, const QueryTile<typename E::Acc>& tile,
                                      const KeyBlock<typename E::Acc>& block, std::int64_t first, KeyRange keys,
                                      const typename E::Unit* weights, const typename E::Unit* rows,
                                      std::int64_t row_length, std::int64_t size, const typename E::Acc* factor,
                                      typename E::Acc* sums) {
    using T = typename E::Acc;
    using Units = Vec<typename E::Unit>;
    const auto seen = [&](int v, std::int64_t j) {
        return visible<T>(problem, tile, v, block.position[first + j], block.document[first + j]);
    };
    for (int v = 0; v < tile.vectors; ++v)
        for (std::int64_t i = 0; i < size; ++i) {
            Vec<T> sum = {};
            for (std::int64_t j = keys.begin; j < keys.end; j += E::unit_k) {
                const Units row = broadcast<typename E::Unit>(rows[j / E::unit_k * row_length + i]);
                const Units weight = load<Units>(weights + vector_at<T>(v, key_units<E>, j / E::unit_k));
                if constexpr (E::unit_k == 1) {
                    sum = seen(v, j) ? E::multiply_add(row, weight, sum) : sum;
                } else {
                    const Units high = j + 1 < keys.end ? (Units)seen(v, j + 1) : Units{};
                    const Units both = ((Units)seen(v, j) & 0xffffu) | (high & 0xffff0000u);
                    sum = E::multiply_add(row & both, weight & both, sum);
                }
            }
            T* const to = sums + vector_at<T>(v, size, i);
            const Vec<T> before = load<Vec<T>>(to);
            store(to, factor == nullptr ? before + sum : fused(before, load<Vec<T>>(factor + v * lanes<T>), sum));
        }
}

// sums (keys, size) += sum over the lanes r that see a key j of factors[j][r] * rows[r]: `column_product` likewise.
template <class E>
FIVEDP_NOINLINE void add_visible_lanes(const AttentionProblem& problem, const QueryTile<typename E::Acc>& tile,
                                       const KeyBlock<typename E::Acc>& block, std::int64_t first, KeyRange keys,
                                       const typename E::Unit* factors, const typename E::Unit* rows, std::int64_t size,
                                       typename E::Acc* sums) {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    constexpr std::int64_t width = group_lanes<T>, room = query_tile / E::unit_k;
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
        const auto seen = [&](std::int64_t lane) {
            return lane < tile.rows &&
                   sees<T>(problem, tile, lane, block.position[first + j], block.document[first + j]);
        };
        for (std::int64_t i = 0; i < column_size<T>(size); i += lanes<T>) {
            const std::int64_t column = i / width, at = i % width;
            Vec<T> sum = {};
            for (std::int64_t u = 0; u < units<E>(tile.rows); ++u) {
                Unit factor = factors[(u / factor_row<E> * key_tile + j) * factor_row<E> + u % factor_row<E>];
                Vec<Unit> row = load<Vec<Unit>>(rows + (column * room + u) * width + at);
                if constexpr (E::unit_k == 1) {
                    if (!seen(u)) continue;
                } else {
                    const Unit both = (seen(2 * u) ? 0xffffu : 0) | (seen(2 * u + 1) ? 0xffff0000u : 0);
                    factor &= both;
                    row &= both;
                }
                sum = E::multiply_add(broadcast<Unit>(factor), row, sum);
            }
            T* const to = sums + (column * key_tile + j) * width + at;
            store(to, load<Vec<T>>(to) + sum);
        }
    }
}
