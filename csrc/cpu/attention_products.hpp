// The products of attention, forward and backward: how their operands are packed, and one register tile for them all.
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
// What is packed are an engine's units (see cpu/microkernel.hpp): numbers of the type of sums or, where an instruction
// multiplies pairs of bfloat16, two neighbours along the index that is summed. A pair begins at an even feature of the
// head, key of the key tile or row of the query tile, and an odd end is filled with zero: which numbers are a pair does
// not depend on what else is in the call. Sizes along a summed index are in units here.
//
// Tiles have the same size for every instruction set, and a sum over more than a tile is the sum of its tiles' sums,
// each started from zero: the bits are the same in all of them (of bfloat16 in all that widen it), and the error grows
// with the number of tiles and not of terms.

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
static_assert(key_grain % 2 == 0 && query_tile % 2 == 0, "no pair lies across a border of tiles or grains");
// Elements that a vector may be read or written beyond the end of packed rows.
template <class T>
static constexpr std::int64_t slack = 2 * lanes<T>;

FIVEDP_INLINE std::int64_t round_up(std::int64_t n, std::int64_t step) {
    return (n + step - 1) / step * step;
}

// Units of n numbers, and of a key tile.
template <class E>
FIVEDP_INLINE std::int64_t units(std::int64_t n) {
    return (n + E::unit_k - 1) / E::unit_k;
}
template <class E>
static constexpr std::int64_t key_units = key_tile / E::unit_k;

// Whether logits are scaled after the product: a query times the scale is a float32, but no bfloat16.
template <class E>
static constexpr bool scaled_after = E::unit_k == 2;

// What becomes of a register tile's sums: they are stored, added to what C holds, added to what C holds times a factor
// for each lane, or (where `scaled_after`) stored times that factor.
enum class End { store, add, scale_and_add, scale };

// c[r][v] = sum over i of a[r * a_row + i * a_step] * b[i][v] or more, see End; r < rows, v < vectors. The sum is one
// chain of fused multiply-adds in rising i from +0. Rows of b and c are `group_lanes` elements apart; every
// `group_lanes` of i, a goes on `a_jump` elements further. All strides are constants: no address in the loop needs
// arithmetic or a register of its own.
template <class E, int rows, int vectors, int a_row, int a_step, int a_jump>
FIVEDP_NOINLINE void tile_product_of(const typename E::Unit* __restrict__ a, const typename E::Unit* __restrict__ b,
                                     std::int64_t n, typename E::Acc* __restrict__ c, End end,
                                     const typename E::Acc* factor) {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
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
            Vec<Unit> row[vectors];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) row[v] = load<Vec<Unit>>(b + i * step + v * lanes<T>);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const Vec<Unit> from_a = broadcast<Unit>(a[r * a_row + i * a_step]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) sum[r][v] = E::multiply_add(from_a, row[v], sum[r][v]);
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
    } else if (scaled_after<E> && end == End::scale) {
        V scale[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) scale[v] = load<V>(factor + v * lanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) sum[r][v] *= scale[v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(c + r * step + v * lanes<T>, sum[r][v]);
}

// The same for 1 .. panel_rows rows, found by halving.
template <class E, int vectors, int a_row, int a_step, int a_jump, int high = panel_rows, int low = 1>
FIVEDP_INLINE void tile_product(std::int64_t rows, const typename E::Unit* a, const typename E::Unit* b, std::int64_t n,
                                typename E::Acc* c, End end, const typename E::Acc* factor) {
    if constexpr (low == high) {
        tile_product_of<E, low, vectors, a_row, a_step, a_jump>(a, b, n, c, end, factor);
    } else {
        constexpr int middle = (low + high) / 2;
        if (rows <= middle)
            tile_product<E, vectors, a_row, a_step, a_jump, middle, low>(rows, a, b, n, c, end, factor);
        else
            tile_product<E, vectors, a_row, a_step, a_jump, high, middle + 1>(rows, a, b, n, c, end, factor);
    }
}

// Rows as panels of `step` <= panel_rows: unit (i, row) is at ((row / step) * room + i) * panel_rows + row % step.
// Features are dealt out to as few panels as will do, as evenly as can be.
FIVEDP_INLINE std::int64_t feature_step(std::int64_t size) {
    const std::int64_t parts = (size + panel_rows - 1) / panel_rows;
    return parts == 0 ? 1 : (size + parts - 1) / parts;
}
FIVEDP_INLINE std::int64_t panels_size(std::int64_t rows, std::int64_t step, std::int64_t room) {
    return (rows + step - 1) / step * room * panel_rows;
}
// Room for the panels of one key tile: rows are keys, rows are features.
template <class E>
FIVEDP_INLINE std::int64_t key_panels_size(std::int64_t size) {
    return panels_size(key_tile, panel_rows, units<E>(size));
}
template <class E>
FIVEDP_INLINE std::int64_t feature_panels_size(std::int64_t size) {
    return panels_size(size, feature_step(size), key_units<E>);
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
template <class E>
FIVEDP_INLINE void lane_product(int vectors, const typename E::Unit* panels, std::int64_t step, std::int64_t room,
                                std::int64_t begin, std::int64_t end, std::int64_t first, std::int64_t n,
                                const typename E::Unit* b, std::int64_t b_first, std::int64_t b_room,
                                typename E::Acc* c, std::int64_t c_room, End how, const typename E::Acc* factor) {
    using T = typename E::Acc;
    constexpr std::int64_t width = group_lanes<T>;
    for (int group = 0; group * lane_vectors < vectors; ++group) {
        const typename E::Unit* const from = b + (group * b_room + b_first) * width;
        T* const to = c + group * c_room * width;
        with_vectors<T>(vectors - group * lane_vectors, [&](auto count) {
            for (std::int64_t row = begin; row < end; row += step)
                tile_product<E, count(), 1, panel_rows, 0>(end - row < step ? end - row : step,
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

// From one key's factors to the next's, and from one group of lanes to the next.
template <class E>
static constexpr std::int64_t factor_row = group_lanes<typename E::Acc> / E::unit_k;
template <class E>
static constexpr std::int64_t factor_jump = key_tile* factor_row<E>;

// sums (keys begin .. end, size) += factors (keys, lanes) rows (lanes, size), the sums over the first n lanes.
template <class E>
FIVEDP_INLINE void column_product(const typename E::Unit* factors, std::int64_t begin, std::int64_t end, std::int64_t n,
                                  const typename E::Unit* rows, std::int64_t size, typename E::Acc* sums) {
    using T = typename E::Acc;
    constexpr std::int64_t width = group_lanes<T>;
    constexpr int jump = width == query_tile ? 0 : (int)factor_jump<E>;
    static_assert(E::unit_k == 1 || jump == 0, "factors in pairs lie in one group");
    for (std::int64_t i = 0; i < size; i += width) {
        const std::int64_t left = size - i;
        with_vectors<T>((left + lanes<T> - 1) / lanes<T>, [&](auto count) {
            for (std::int64_t key = begin; key < end; key += panel_rows)
                tile_product<E, count(), (int)factor_row<E>, 1, jump>(
                    end - key < panel_rows ? end - key : panel_rows, factors + key * factor_row<E>,
                    rows + i * (query_tile / E::unit_k), units<E>(n), sums + i * key_tile + key * width, End::add,
                    nullptr);
        });
    }
}
