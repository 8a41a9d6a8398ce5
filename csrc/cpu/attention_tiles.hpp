// What attention's forward and backward share: packed operands, the tile products, the logits of a tile and its mask.
//
// Queries lie in the lanes of vectors: a tile is 64 query rows of one key head's group, its logits are (keys, lanes)
// and its output is (features, lanes). The largest logit, the sum and the rescaling need no horizontal step, and every
// sum over features or over keys is the same register tile:
//
//     sums (rows, lanes) = panel (i, rows)^T  factors (i, lanes)       logits: rows are keys, i features
//                                                                      output, d_q: rows are features, i keys
//
// The gradients of keys and values are sums over queries; there the features lie in the lanes:
//
//     sums (keys, features) = factors (keys, lanes)  rows (lanes, features)
//
// Everything packed is of the type of sums. Tiles have the same size for every instruction set, and a sum over more
// than a tile is the sum of its tiles' sums, each started from zero: the bits are the same in all of them, and the
// error grows with the number of tiles and not of terms.

static constexpr std::int64_t key_tile = 84;
// Keys packed at a time.
static constexpr std::int64_t key_block = 4 * key_tile;
// Keys at the ends of a tile that no query of the tile sees are left out in steps of this many.
static constexpr std::int64_t key_grain = 6;
// The register tile: panel_rows x lane_vectors vectors. Lanes lie in groups of that width, one group after the other:
// (i, lane) of an array with n rows is at (lane / group_lanes * n + i) * group_lanes + lane % group_lanes.
static constexpr int panel_rows = FIVEDP_ATTENTION_ROWS, lane_vectors = FIVEDP_ATTENTION_VECTORS;
template <class T>
static constexpr std::int64_t group_lanes = lane_vectors* lanes<T>;
static_assert(query_tile % group_lanes<float> == 0 && query_tile % group_lanes<double> == 0, "tiles are whole groups");
static_assert(key_tile % key_grain == 0 && key_grain % panel_rows == 0, "key tiles are cut into whole panels");
// Rows of transposed keys: a multiple of 8, for they are transposed 8 x 8.
static constexpr std::int64_t transposed_width = (key_tile + 7) / 8 * 8;
// Elements that a vector may be read or written beyond the end of packed rows.
template <class T>
static constexpr std::int64_t slack = 2 * lanes<T>;

FIVEDP_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) {
    return (n + step - 1) / step * step;
}

// What becomes of a register tile's sums: they are stored, added to what C holds, or added to what C holds times a
// factor for each lane.
enum class End { store, add, scale_and_add };

// c[r][v] = sum over i of a[r * a_row + i * a_step] * b[i][v] or more, see End; r < rows, v < vectors. The sum is one
// chain of fused multiply-adds in rising i from +0. Rows of b and c are `group_lanes` elements apart; every
// `group_lanes` of i, a goes on `a_jump` elements further. All strides are constants: no address in the loop needs
// arithmetic or a register of its own.
template <class T, int rows, int vectors, int a_row, int a_step, int a_jump>
FIVEDP_NOINLINE void tile_product_of(const T* __restrict__ a, const T* __restrict__ b, std::int64_t n,
                                     T* __restrict__ c, End end, const T* factor) {
    using V = Vec<T>;
    constexpr std::int64_t step = group_lanes<T>;
    V sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) sum[r][v] = V{};
    for (std::int64_t left = n; left > 0; left -= step) {
        const std::int64_t count = a_jump == 0 || left < step ? left : step;
#pragma GCC unroll 2
        for (std::int64_t i = 0; i < count; ++i) {
            V row[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) row[v] = load<V>(b + i * step + v * lanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const V from_a = broadcast<T>(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) sum[r][v] = fused(from_a, row[v], sum[r][v]);
            }
        }
        if constexpr (a_jump == 0) break;
        a += a_jump;
        b += step * step;
    }
    if (end == End::add) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = load<V>(c + r * step + v * lanes<T>) + sum[r][v];
    } else if (end == End::scale_and_add) {
        V scale[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) scale[v] = load<V>(factor + v * lanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v)
                sum[r][v] = fused(load<V>(c + r * step + v * lanes<T>), scale[v], sum[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(c + r * step + v * lanes<T>, sum[r][v]);
}

// The same for 1 .. panel_rows rows, found by halving.
template <class T, int vectors, int a_row, int a_step, int a_jump, int high = panel_rows, int low = 1>
FIVEDP_INLINE void tile_product(std::int64_t rows, const T* a, const T* b, std::int64_t n, T* c, End end,
                                const T* factor) {
    if constexpr (low == high) {
        tile_product_of<T, low, vectors, a_row, a_step, a_jump>(a, b, n, c, end, factor);
    } else {
        constexpr int middle = (low + high) / 2;
        if (rows <= middle)
            tile_product<T, vectors, a_row, a_step, a_jump, middle, low>(rows, a, b, n, c, end, factor);
        else
            tile_product<T, vectors, a_row, a_step, a_jump, high, middle + 1>(rows, a, b, n, c, end, factor);
    }
}

// Rows as panels of `step` <= panel_rows: element (i, row) is at ((row / step) * room + i) * panel_rows + row % step.
// Features are dealt out to as few panels as will do, as evenly as can be.
FIVEDP_INLINE std::int64_t feature_step(std::int64_t size) {
    const std::int64_t parts = (size + panel_rows - 1) / panel_rows;
    return parts == 0 ? 1 : (size + parts - 1) / parts;
}
FIVEDP_INLINE std::int64_t panels_size(std::int64_t rows, std::int64_t step, std::int64_t room) {
    return (rows + step - 1) / step * room * panel_rows;
}

// from (n, rows) to panels of its columns. Whole vectors are copied: what one writes too much the next one mends.
template <class T>
FIVEDP_INLINE void split(const T* from, std::int64_t from_step, std::int64_t n, std::int64_t rows, std::int64_t step,
                         std::int64_t room, T* panels) {
    for (std::int64_t row = 0; row < rows; row += step) {
        T* to = panels + row / step * room * panel_rows;
        for (std::int64_t i = 0; i < n; ++i, to += panel_rows)
            for (std::int64_t r = 0; r < step; r += lanes<T>)
                store(to + r, load<Vec<T>>(from + i * from_step + row + r));
    }
}

// Calls tiles(vectors) with as many vectors as a compile-time constant.
template <class T, class Tiles, int most = lane_vectors>
FIVEDP_INLINE void with_vectors(std::int64_t vectors, const Tiles& tiles) {
    if constexpr (most > 1) {
        if (vectors < most) return with_vectors<T, Tiles, most - 1>(vectors, tiles);
    }
    tiles(std::integral_constant<int, most>());
}

// c (rows begin .. end, lanes) = panels (first .. first + n)^T b (b_first .. b_first + n, lanes), or more (see End),
// for the first `vectors` vectors. b has b_room rows in all, c has c_room.
template <class T>
FIVEDP_INLINE void lane_product(int vectors, const T* panels, std::int64_t step, std::int64_t room, std::int64_t begin,
                                std::int64_t end, std::int64_t first, std::int64_t n, const T* b, std::int64_t b_first,
                                std::int64_t b_room, T* c, std::int64_t c_room, End how, const T* factor) {
    constexpr std::int64_t width = group_lanes<T>;
    for (int group = 0; group * lane_vectors < vectors; ++group) {
        const T* const from = b + (group * b_room + b_first) * width;
        T* const to = c + group * c_room * width;
        with_vectors<T>(vectors - group * lane_vectors, [&](auto count) {
            for (std::int64_t row = begin; row < end; row += step)
                tile_product<T, count(), 1, panel_rows, 0>(end - row < step ? end - row : step,
                                                           panels + (row / step * room + first) * panel_rows, from, n,
                                                           to + row * width, how, factor + group * width);
        });
    }
}

// Rows cut into columns as wide as a group of lanes: element (row, i) is at ((i / group_lanes) * room + row) *
// group_lanes + i % group_lanes, filled with zeros to whole columns.
template <class T>
FIVEDP_INLINE std::int64_t column_size(std::int64_t size) {
    return round_up(size, group_lanes<T>);
}
template <class T>
FIVEDP_INLINE void to_columns(const T* from, std::int64_t row, std::int64_t size, std::int64_t room, T* columns) {
    for (std::int64_t i = 0; i < size; i += group_lanes<T>) {
        T* const to = columns + i * room + row * group_lanes<T>;
        const std::int64_t n = size - i < group_lanes<T> ? size - i : group_lanes<T>;
        for (std::int64_t c = 0; c < n; ++c) to[c] = from[i + c];
        for (std::int64_t c = n; c < group_lanes<T>; ++c) to[c] = 0;
    }
}
template <class T>
FIVEDP_INLINE void from_columns(const T* columns, std::int64_t row, std::int64_t size, std::int64_t room, T* to) {
    for (std::int64_t i = 0; i < size; i += group_lanes<T>) {
        const T* const from = columns + i * room + row * group_lanes<T>;
        const std::int64_t n = size - i < group_lanes<T> ? size - i : group_lanes<T>;
        for (std::int64_t c = 0; c < n; ++c) to[i + c] = from[c];
    }
}

// sums (keys begin .. end, size) += factors (keys, lanes) rows (lanes, size), the sums over the first n lanes.
template <class T>
FIVEDP_INLINE void column_product(const T* factors, std::int64_t begin, std::int64_t end, std::int64_t n, const T* rows,
                                  std::int64_t size, T* sums) {
    constexpr std::int64_t width = group_lanes<T>;
    constexpr int jump = width == query_tile ? 0 : (int)(key_tile * width);
    for (std::int64_t i = 0; i < size; i += width) {
        const std::int64_t left = size - i;
        with_vectors<T>((left + lanes<T> - 1) / lanes<T>, [&](auto count) {
            for (std::int64_t key = begin; key < end; key += panel_rows)
                tile_product<T, count(), (int)width, 1, jump>(end - key < panel_rows ? end - key : panel_rows,
                                                              factors + key * width, rows + i * query_tile, n,
                                                              sums + i * key_tile + key * width, End::add, nullptr);
        });
    }
}

// One token's row, widened, and zeros after it.
template <class T, class Source>
FIVEDP_INLINE void widen_row(const char* from, std::int64_t size, T* to, std::int64_t length) {
    for (std::int64_t i = 0; i < size; ++i) to[i] = element<T, Source>(from + i * (std::int64_t)sizeof(Source));
    for (std::int64_t i = size; i < length; ++i) to[i] = 0;
}

template <class T>
FIVEDP_INLINE void widen_row_as(ElementType type, const char* from, std::int64_t size, T* to, std::int64_t length) {
    if constexpr (sizeof(T) == 8) {
        widen_row<T, double>(from, size, to, length);
    } else if (type == ElementType::bf16) {
        widen_row<T, std::uint16_t>(from, size, to, length);
    } else {
        widen_row<T, float>(from, size, to, length);
    }
}

// (rows, size) to (size, width), scaled; columns from `rows` on are zero.
template <class T>
FIVEDP_INLINE void transpose_rows(const T* from, std::int64_t from_step, std::int64_t rows, std::int64_t size, T* to,
                                  std::int64_t width, T scale) {
    transpose<T, T>((const char*)from, from_step * (std::int64_t)sizeof(T), rows, size, to, width);
    if (rows < width)
        for (std::int64_t i = 0; i < size; ++i)
            for (std::int64_t r = rows; r < width; ++r) to[i * width + r] = 0;
    if (scale != T(1))
        for (std::int64_t i = 0; i < size * width; ++i) to[i] *= scale;
}

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

// Where row `row` of a range is: its query and its head.
struct RowAt {
    std::int64_t query, head;
};
FIVEDP_INLINE RowAt row_at(const AttentionProblem& problem, const AttentionRange& range, std::int64_t row) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    return {range.query_begin + row / group, range.kv_head * group + row % group};
}

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

// Whether rows hold NaN or infinity.
template <class T>
FIVEDP_INLINE bool has_nonfinite(const T* rows, std::int64_t count, std::int64_t length, std::int64_t row_length) {
    using Bits = IndexOf<T>;
    constexpr Bits exponent = sizeof(T) == 4 ? (Bits)0x7f800000 : (Bits)0x7ff0000000000000;
    Vec<Bits> found = {};
    bool any = false;
    for (std::int64_t r = 0; r < count; ++r) {
        const T* const row = rows + r * row_length;
        std::int64_t i = 0;
        for (; i + lanes<T> <= length; i += lanes<T>) found |= (load<Vec<Bits>>(row + i) & exponent) == exponent;
        for (; i < length; ++i) any |= !(T(0) * row[i] == T(0));
    }
    for (int lane = 0; lane < lanes<T>; ++lane) any |= found[lane] != 0;
    return any;
}

// The rows of keys or values of one tile, widened, `row_length` apart.
template <class T>
FIVEDP_INLINE void stage_rows(const AttentionProblem& problem, const TokenView& view, std::int64_t batch,
                              std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t size, T* rows,
                              std::int64_t row_length) {
    const char* from = view.data + batch * view.batch_stride + head * view.head_stride + first * view.token_stride;
    for (std::int64_t i = 0; i < count; ++i)
        widen_row_as<T>(problem.type, from + i * view.token_stride, size, rows + i * row_length, row_length);
}

// Panels whose rows are keys (or values), for products with queries (or gradients) over features. `transposed` is room
// for (size, transposed_width).
template <class T>
FIVEDP_INLINE void panels_of_keys(const AttentionProblem& problem, const TokenView& view, std::int64_t batch,
                                  std::int64_t head, std::int64_t first, std::int64_t count, std::int64_t size,
                                  T* transposed, T* panels) {
    const char* from = view.data + batch * view.batch_stride + head * view.head_stride + first * view.token_stride;
    if constexpr (sizeof(T) == 8) {
        transpose<T, double>(from, view.token_stride, count, size, transposed, transposed_width);
    } else if (problem.type == ElementType::bf16) {
        transpose<T, std::uint16_t>(from, view.token_stride, count, size, transposed, transposed_width);
    } else {
        transpose<T, float>(from, view.token_stride, count, size, transposed, transposed_width);
    }
    split(transposed, transposed_width, size, count, panel_rows, size, panels);
}

// Panels whose rows are features, for sums over keys.
template <class T>
FIVEDP_INLINE void panels_of_features(const T* rows, std::int64_t row_length, std::int64_t count, std::int64_t size,
                                      T* panels) {
    split(rows, row_length, count, size, feature_step(size), key_tile, panels);
}

// Room for the panels of one key tile.
template <class T>
FIVEDP_INLINE std::int64_t key_panels_size(std::int64_t size) {
    return panels_size(key_tile, panel_rows, size);
}
template <class T>
FIVEDP_INLINE std::int64_t feature_panels_size(std::int64_t size) {
    return panels_size(size, feature_step(size), key_tile);
}

// The keys of a tile that a tile of queries may see at all, rounded outward to `key_grain`.
struct KeyRange {
    std::int64_t begin, end;
};
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

// Where vector v of row i is, in an array of n rows.
template <class T>
FIVEDP_INLINE std::int64_t vector_at(int v, std::int64_t n, std::int64_t i) {
    return (v / lane_vectors * n + i) * group_lanes<T> + v % lane_vectors * lanes<T>;
}

// sums (size, lanes) = sums * factor + sum over the keys j that a lane sees of rows[j] * weights[j][lane]:
// `lane_product` with the same bits, for tiles in which 0 times a masked row would be NaN.
template <class T>
FIVEDP_NOINLINE void add_visible_keys(const AttentionProblem& problem, const QueryTile<T>& tile,
                                      const KeyBlock<T>& block, std::int64_t first, KeyRange keys, const T* weights,
                                      const T* rows, std::int64_t row_length, std::int64_t size, const T* factor,
                                      T* sums) {
    for (int v = 0; v < tile.vectors; ++v)
        for (std::int64_t i = 0; i < size; ++i) {
            Vec<T> sum = {};
            for (std::int64_t j = keys.begin; j < keys.end; ++j) {
                const Vec<IndexOf<T>> seen =
                    visible<T>(problem, tile, v, block.position[first + j], block.document[first + j]);
                const Vec<T> weight = load<Vec<T>>(weights + vector_at<T>(v, key_tile, j));
                sum = seen ? fused(broadcast<T>(rows[j * row_length + i]), weight, sum) : sum;
            }
            T* const to = sums + vector_at<T>(v, size, i);
            const Vec<T> before = load<Vec<T>>(to);
            store(to, factor == nullptr ? before + sum : fused(before, load<Vec<T>>(factor + v * lanes<T>), sum));
        }
}

// sums (keys, size) += sum over the lanes r that see a key j of factors[j][r] * rows[r]: `column_product` likewise.
template <class T>
FIVEDP_NOINLINE void add_visible_lanes(const AttentionProblem& problem, const QueryTile<T>& tile,
                                       const KeyBlock<T>& block, std::int64_t first, KeyRange keys, const T* factors,
                                       const T* rows, std::int64_t size, T* sums) {
    constexpr std::int64_t width = group_lanes<T>;
    for (std::int64_t j = keys.begin; j < keys.end; ++j)
        for (std::int64_t i = 0; i < column_size<T>(size); i += lanes<T>) {
            const std::int64_t column = i / width, at = i % width;
            Vec<T> sum = {};
            for (std::int64_t r = 0; r < tile.rows; ++r) {
                if (!sees<T>(problem, tile, r, block.position[first + j], block.document[first + j])) continue;
                const T factor = factors[(r / width * key_tile + j) * width + r % width];
                sum = fused(broadcast<T>(factor), load<Vec<T>>(rows + (column * query_tile + r) * width + at), sum);
            }
            T* const to = sums + (column * key_tile + j) * width + at;
            store(to, load<Vec<T>>(to) + sum);
        }
}
