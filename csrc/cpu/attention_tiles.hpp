// What attention's forward and backward share: packed rows, the tile product, the logits of a tile and its mask.
//
// Queries lie in the lanes of vectors: a tile is `lane_count` query rows of one key head's group, and its logits are
// (keys, lanes), so that the largest and the sum over keys need no horizontal step. Everything packed is of the type of
// sums; rows are filled with zeros to whole vectors.

template <class T>
static constexpr std::int64_t lane_count = tile_columns<T>;
// Keys whose logits are made at a time, and keys packed at a time. The same for every instruction set: the sums of a
// query are in the order of its keys, tile by tile, so they have the same bits in all of them.
static constexpr std::int64_t key_tile = 84, key_block = 4 * key_tile;
static_assert(key_tile % tile_rows == 0, "a key tile is cut into whole register tiles");
// From one element of packed keys to the next of the same key; a multiple of 8, for they are transposed 8 x 8.
static constexpr std::int64_t panel_width = 88;

template <class T>
FIVEDP_INLINE std::int64_t padded(std::int64_t size) {
    return (size + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// c[r][v] (+)= sum over i of a[r * row_stride + i * a_step] * b[i][v], r < rows, v < vectors: a chain of fused
// multiply-adds in rising i, from +0 or from what C holds.
template <class T, int row_stride, int vectors, int rows>
FIVEDP_NOINLINE void tile_product_of(const T* __restrict__ a, std::int64_t a_step, const T* __restrict__ b,
                                     std::int64_t b_step, std::int64_t n, T* c, std::int64_t c_step, bool add) {
    using V = Vec<T>;
    V sum[rows][vectors];
    if (add) {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = load<V>(c + r * c_step + v * lanes<T>);
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = V{};
    }
    for (std::int64_t i = 0; i < n; ++i) {
        V row[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) row[v] = load<V>(b + v * lanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const V factor = broadcast<T>(a[r * row_stride]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] = fused(factor, row[v], sum[r][v]);
        }
        a += a_step;
        b += b_step;
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(c + r * c_step + v * lanes<T>, sum[r][v]);
}

template <class T, int row_stride, int vectors, int low = 1, int high = tile_rows>
FIVEDP_INLINE void tile_rows_product(int rows, const T* a, std::int64_t a_step, const T* b, std::int64_t b_step,
                                     std::int64_t n, T* c, std::int64_t c_step, bool add) {
    if constexpr (low == high) {
        tile_product_of<T, row_stride, vectors, low>(a, a_step, b, b_step, n, c, c_step, add);
    } else {
        constexpr int middle = (low + high) / 2;
        if (rows <= middle)
            tile_rows_product<T, row_stride, vectors, low, middle>(rows, a, a_step, b, b_step, n, c, c_step, add);
        else
            tile_rows_product<T, row_stride, vectors, middle + 1, high>(rows, a, a_step, b, b_step, n, c, c_step, add);
    }
}

// C (rows, columns) (+)= A (rows, n) B (n, columns), columns a multiple of `lanes`; cut into register tiles of rows as
// equal as can be.
template <class T, int row_stride>
FIVEDP_INLINE void small_product(std::int64_t rows, std::int64_t columns, std::int64_t n, const T* a,
                                 std::int64_t a_step, const T* b, std::int64_t b_step, T* c, std::int64_t c_step,
                                 bool add) {
    const std::int64_t parts = (rows + tile_rows - 1) / tile_rows;
    for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t begin = part * rows / parts, end = (part + 1) * rows / parts;
        std::int64_t j = 0;
        for (; j + tile_columns<T> <= columns; j += tile_columns<T>)
            tile_rows_product<T, row_stride, tile_vectors>((int)(end - begin), a + begin * row_stride, a_step, b + j,
                                                           b_step, n, c + begin * c_step + j, c_step, add);
        if (j < columns)
            tile_rows_product<T, row_stride, 1>((int)(end - begin), a + begin * row_stride, a_step, b + j, b_step, n,
                                                c + begin * c_step + j, c_step, add);
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
    std::int64_t rows;  // in use, at most lane_count
    Span<Index> span;
    bool finite;  // no NaN or infinity in its rows
    Index position[tile_columns<T>], document[tile_columns<T>];
    T slope[tile_columns<T>];
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
    tile.finite = true;
    for (std::int64_t lane = 0; lane < lane_count<T>; ++lane) {
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

// Whether a row holds NaN or infinity.
template <class T>
FIVEDP_INLINE bool has_nonfinite(const T* row, std::int64_t length) {
    using Bits = IndexOf<T>;
    constexpr Bits exponent = sizeof(T) == 4 ? (Bits)0x7f800000 : (Bits)0x7ff0000000000000;
    Vec<Bits> found = {};
    std::int64_t i = 0;
    for (; i + lanes<T> <= length; i += lanes<T>) found |= (load<Vec<Bits>>(row + i) & exponent) == exponent;
    bool any = false;
    for (int lane = 0; lane < lanes<T>; ++lane) any |= found[lane] != 0;
    for (; i < length; ++i) any |= !(T(0) * row[i] == T(0));
    return any;
}

// Rows of keys or values, packed; notes tiles with NaN or infinity.
template <class T>
FIVEDP_INLINE void pack_rows(const AttentionProblem& problem, const TokenView& view, std::int64_t batch,
                             std::int64_t head, std::int64_t first, std::int64_t size, KeyBlock<T>& block, T* rows,
                             std::int64_t row_length) {
    const char* from = view.data + batch * view.batch_stride + head * view.head_stride + first * view.token_stride;
    for (std::int64_t i = 0; i < block.count; ++i)
        widen_row_as<T>(problem.type, from + i * view.token_stride, size, rows + i * row_length, row_length);
    for (std::int64_t i = 0; i < block.count; i += key_tile) {
        const std::int64_t n = block.count - i < key_tile ? block.count - i : key_tile;
        if (has_nonfinite(rows + i * row_length, n * row_length)) block.finite[i / key_tile] = false;
    }
}

// Room for the panels of a block.
FIVEDP_INLINE std::int64_t panel_room(std::int64_t size) {
    return 4 * size * panel_width;
}

// Rows as panels for the logits, (size, panel_width) for every key tile.
template <class T>
FIVEDP_INLINE void panels_of(const T* rows, std::int64_t row_length, std::int64_t count, std::int64_t size, T* panels) {
    for (std::int64_t i = 0; i < count; i += key_tile) {
        const std::int64_t n = count - i < key_tile ? count - i : key_tile;
        transpose<T, T>((const char*)(rows + i * row_length), row_length * (std::int64_t)sizeof(T), n, size,
                        panels + i / key_tile * size * panel_width, panel_width);
    }
}

// products[key][lane] of the `count` packed keys (or values) of a tile and a tile of transposed queries (or gradients).
template <class T>
FIVEDP_INLINE void tile_against(const T* panels, std::int64_t count, std::int64_t size, const T* queries, T* products) {
    for (std::int64_t i = 0; i < count; i += tile_rows) {
        const std::int64_t n = count - i < tile_rows ? count - i : tile_rows;
        tile_rows_product<T, 1, tile_vectors>((int)n, panels + i, panel_width, queries, lane_count<T>, size,
                                              products + i * lane_count<T>, lane_count<T>, false);
    }
}

static constexpr double log2_of_e = 1.4426950408889634074;

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

// sums[r] += sum over visible keys j of factors[j][r] * rows[j], or, with `keys`, sums[j] += sum over lanes r that see
// it of factors[j][r] * rows[r]: `small_product` one visible pair at a time, with the same bits, for tiles in which 0
// times a masked row would be NaN.
template <class T, bool keys>
FIVEDP_NOINLINE void add_visible(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                                 std::int64_t begin, std::int64_t count, const T* factors, const T* rows, T* sums,
                                 std::int64_t row_length) {
    for (std::int64_t j = 0; j < count; ++j)
        for (std::int64_t r = 0; r < tile.rows; ++r) {
            if (!sees<T>(problem, tile, r, block.position[begin + j], block.document[begin + j])) continue;
            const Vec<T> factor = broadcast<T>(factors[j * lane_count<T> + r]);
            const T* const from = rows + (keys ? r : j) * row_length;
            T* const to = sums + (keys ? j : r) * row_length;
            for (std::int64_t i = 0; i < row_length; i += lanes<T>)
                store(to + i, fused(factor, load<Vec<T>>(from + i), load<Vec<T>>(to + i)));
        }
}
