// Packing: the pieces of A and B that some chains need, joined, widened and laid out for the microkernel.
//
//     A: rows along k,             to[r * pass_units + k]
//     B: panels of 1 .. tile_vectors vectors, to[k * width + j], filled up with zero columns
//
// Three ways, by the source's strides: contiguous along the packed direction (copy), contiguous across it (transposed
// in registers, 8 x 8), or any strides (element by element). Sources are read where they lie and may be unaligned.
// Where they are contiguous one way, their rows may lie anywhere (see Piece): each is then looked up in a table.

// Where the rows of a source begin: at a stride, or wherever a table of them says.
struct StridedRows {
    const char* first;
    std::int64_t stride;
    FIVEDP_INLINE const char* at(const StridedRows& rows, std::int64_t i) { return rows.first + i * rows.stride; }
};
struct GatheredRows {
    const char* const* row;
    std::int64_t offset;  // in bytes, from the beginning of each row
    FIVEDP_INLINE const char* at(const GatheredRows& rows, std::int64_t i) { return rows.row[i] + rows.offset; }
};

// to[column * to_stride + row] = from[row * from_stride (bytes) + column]
template <class T, class Source>
FIVEDP_INLINE void transpose_any(const char* from, std::int64_t from_row, std::int64_t from_column, std::int64_t rows,
                                 std::int64_t columns, T* to, std::int64_t to_stride) {
    for (std::int64_t column = 0; column < columns; ++column)
        for (std::int64_t row = 0; row < rows; ++row)
            to[column * to_stride + row] = element<T, Source>(from + row * from_row + column * from_column);
}

#if defined(__has_builtin) && FIVEDP_VECTOR_BYTES >= 32
#if __has_builtin(__builtin_shufflevector)
#define FIVEDP_TRANSPOSE 1
#endif
#endif

#ifdef FIVEDP_TRANSPOSE
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));

template <class Source>
FIVEDP_INLINE Float8 load_float8(const char* from) {
    if constexpr (sizeof(Source) == 2) {
        __m128i halves;
        __builtin_memcpy(&halves, from, sizeof halves);
        return (Float8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
    } else {
        return load<Float8>(from);
    }
}

// Swaps ever smaller off-diagonal blocks: 4 x 4, 2 x 2, 1 x 1.
template <class T>
FIVEDP_INLINE void store_transposed(Float8 (&x)[8], T* to, std::int64_t to_stride) {
    Float8 y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 4; ++i) {
        y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        if (i & 2) continue;
        x[i] = __builtin_shufflevector(y[i], y[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        x[i + 2] = __builtin_shufflevector(y[i], y[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        if (i & 1) continue;
        store(to + i * to_stride, __builtin_shufflevector(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14));
        store(to + (i + 1) * to_stride, __builtin_shufflevector(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15));
    }
}

template <class Source, class Rows>
FIVEDP_INLINE void transpose_square(const Rows& from, std::int64_t row, std::int64_t at, float* to,
                                    std::int64_t to_stride) {
    Float8 x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) x[i] = load_float8<Source>(Rows::at(from, row + i) + at);
    store_transposed(x, to, to_stride);
}

// 16 rows of 8 halves: as a square of pairs, each of which two rows make.
template <class Source, class Rows>
FIVEDP_INLINE void transpose_square(const Rows& from, std::int64_t row, std::int64_t at, std::uint16_t* to,
                                    std::int64_t to_stride) {
    Float8 x[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m128i even = load<__m128i>(Rows::at(from, row + 2 * i) + at);
        const __m128i odd = load<__m128i>(Rows::at(from, row + 2 * i + 1) + at);
        x[i] = (Float8)_mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
    }
    store_transposed(x, to, to_stride);
}

template <class Source, class Rows>
FIVEDP_INLINE void transpose_square(const Rows& from, std::int64_t row, std::int64_t at, double* to,
                                    std::int64_t to_stride) {
    Double4 x[4], y[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = load<Double4>(Rows::at(from, row + i) + at);
#pragma GCC unroll 4
    for (int i = 0; i < 2; ++i) {
        y[i] = __builtin_shufflevector(x[i], x[i + 2], 0, 1, 4, 5);
        y[i + 2] = __builtin_shufflevector(x[i], x[i + 2], 2, 3, 6, 7);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i += 2) {
        store(to + i * to_stride, __builtin_shufflevector(y[i], y[i + 1], 0, 4, 2, 6));
        store(to + (i + 1) * to_stride, __builtin_shufflevector(y[i], y[i + 1], 1, 5, 3, 7));
    }
}
#endif

// to[column * to_stride + row] = from(row)[column]; each row is contiguous.
template <class T, class Source, class Rows>
FIVEDP_INLINE void transpose_edge(const Rows& from, std::int64_t row_begin, std::int64_t row_end,
                                  std::int64_t column_begin, std::int64_t column_end, T* to, std::int64_t to_stride) {
    for (std::int64_t column = column_begin; column < column_end; ++column)
        for (std::int64_t row = row_begin; row < row_end; ++row)
            to[column * to_stride + row] =
                element<T, Source>(Rows::at(from, row) + column * (std::int64_t)sizeof(Source));
}

template <class T, class Source, class Rows>
FIVEDP_INLINE void transpose(const Rows& from, std::int64_t rows, std::int64_t columns, T* to, std::int64_t to_stride) {
#ifdef FIVEDP_TRANSPOSE
    using Lane = std::conditional_t<sizeof(T) == 8, double, std::conditional_t<sizeof(T) == 4, float, std::uint16_t>>;
    constexpr int high = 32 / sizeof(T), wide = sizeof(T) == 2 ? 8 : high;
    const std::int64_t square_rows = rows / high * high, square_columns = columns / wide * wide;
    for (std::int64_t row = 0; row < square_rows; row += high)
        for (std::int64_t column = 0; column < square_columns; column += wide)
            transpose_square<Source>(from, row, column * (std::int64_t)sizeof(Source),
                                     (Lane*)(to + column * to_stride + row), to_stride);
    transpose_edge<T, Source>(from, 0, square_rows, square_columns, columns, to, to_stride);
    transpose_edge<T, Source>(from, square_rows, rows, 0, columns, to, to_stride);
#else
    transpose_edge<T, Source>(from, 0, rows, 0, columns, to, to_stride);
#endif
}

template <class T, class Source>
FIVEDP_INLINE void transpose(const char* from, std::int64_t from_row, std::int64_t rows, std::int64_t columns, T* to,
                             std::int64_t to_stride) {
    transpose<T, Source>(StridedRows{from, from_row}, rows, columns, to, to_stride);
}

// The part of a piece that lies between two k.
struct Overlap {
    std::int64_t begin, end;
};
FIVEDP_INLINE Overlap overlap(const Piece& piece, std::int64_t k_begin, std::int64_t k_end) {
    return {piece.k_begin > k_begin ? piece.k_begin : k_begin, piece.k_end < k_end ? piece.k_end : k_end};
}

// Where an element of a piece lies.
FIVEDP_INLINE const char* place_of(const Piece& piece, std::int64_t batch, std::int64_t outer, std::int64_t k) {
    const std::int64_t in_piece = k - piece.k_begin;
    if (piece.rows == nullptr)
        return piece.data + batch * piece.batch_stride + outer * piece.outer_stride + in_piece * piece.k_stride;
    // One of the strides is 0: that index chose the row.
    return piece.rows[piece.outer_stride == 0 ? outer : in_piece] + outer * piece.outer_stride +
           in_piece * piece.k_stride;
}

// Calls with(rows) for the rows of a piece: from `begin` on at a stride, or from row `first` of its table on,
// `offset` bytes into each.
template <class With>
FIVEDP_INLINE void with_rows(const Piece& piece, const char* begin, std::int64_t stride, std::int64_t first,
                             std::int64_t offset, const With& with) {
    if (piece.rows != nullptr)
        with(GatheredRows{piece.rows + first, offset});
    else
        with(StridedRows{begin, stride});
}

// Rows row_begin .. row_begin + rows of A for k_begin <= k < k_end.
template <class E>
FIVEDP_NOINLINE void pack_a(const Operand& a, std::int64_t batch, std::int64_t row_begin, std::int64_t rows,
                            std::int64_t k_begin, std::int64_t k_end, typename E::Unit* to) {
    using Source = typename E::Source;
    // A pair of bf16 is stored as it lies in memory, so the packed rows are rows of Source there.
    using Stored = std::conditional_t<E::unit_k == 2, Source, typename E::Unit>;
    constexpr std::int64_t row_length = FIVEDP_PASS_K, size = sizeof(Source);
    Stored* const rows_of_a = (Stored*)to;
    for (std::int64_t p = 0; p < a.n_pieces; ++p) {
        const Piece& piece = a.pieces[p];
        const Overlap part = overlap(piece, k_begin, k_end);
        if (part.begin >= part.end) continue;
        const char* const from = place_of(piece, batch, row_begin, part.begin);
        Stored* into = rows_of_a + (part.begin - k_begin);
        const std::int64_t count = part.end - part.begin;
        if (piece.k_stride == size) {
            with_rows(piece, from, piece.outer_stride, row_begin, (part.begin - piece.k_begin) * size,
                      [&](const auto& source) {
                          using Rows = std::decay_t<decltype(source)>;
                          for (std::int64_t r = 0; r < rows; ++r) {
                              const char* row = Rows::at(source, r);
                              Stored* row_to = into + r * row_length;
                              for (std::int64_t k = 0; k < count; ++k)
                                  row_to[k] = element<Stored, Source>(row + k * size);
                          }
                      });
        } else if (piece.outer_stride == size) {
            with_rows(piece, from, piece.k_stride, part.begin - piece.k_begin, row_begin * size,
                      [&](const auto& source) { transpose<Stored, Source>(source, count, rows, into, row_length); });
        } else {
            transpose_any<Stored, Source>(from, piece.k_stride, piece.outer_stride, count, rows, into, row_length);
        }
    }
    if constexpr (E::unit_k == 2) {
        if ((k_end - k_begin) % 2 != 0)
            for (std::int64_t r = 0; r < rows; ++r) rows_of_a[r * row_length + (k_end - k_begin)] = 0;
    }
}

// One vector of units at byte `at` of B's rows: rows[0], and rows[1] for pairs (null is zero), contiguous along n.
template <class E>
FIVEDP_INLINE Vec<typename E::Unit> load_units(const char* const* rows, std::int64_t at) {
    using Unit = typename E::Unit;
    using Source = typename E::Source;
    if constexpr (sizeof(Source) == sizeof(Unit)) {
        return load<Vec<Unit>>(rows[0] + at);
    } else {
        const Halves first = load<Halves>(rows[0] + at);
        if constexpr (E::unit_k == 1) return (Vec<Unit>)widened(first);
        const auto low = __builtin_convertvector(first, Vec<std::uint32_t>);
        if (rows[E::unit_k - 1] == nullptr) return (Vec<Unit>)low;
        return (Vec<Unit>)(low | (Vec<std::uint32_t>)widened(load<Halves>(rows[E::unit_k - 1] + at)));
    }
}

// Columns column_begin .. column_begin + columns of B for k_begin <= k < k_end, one panel.
template <class E, int vectors>
FIVEDP_NOINLINE void pack_b(const Operand& b, std::int64_t batch, std::int64_t column_begin, std::int64_t columns,
                            std::int64_t k_begin, std::int64_t k_end, typename E::Unit* to) {
    using Source = typename E::Source;
    using Unit = typename E::Unit;
    using Acc = typename E::Acc;
    constexpr std::int64_t size = sizeof(Source), width = vectors * lanes<Acc>;
    const std::int64_t units = (k_end - k_begin + E::unit_k - 1) / E::unit_k;
    // The columns beyond `columns`, and the missing half of a last pair.
    if (columns < width || (k_end - k_begin) % E::unit_k != 0)
        for (std::int64_t i = (columns < width ? 0 : units - 1) * width; i < units * width; ++i) to[i] = 0;
    for (std::int64_t p = 0; p < b.n_pieces; ++p) {
        const Piece& piece = b.pieces[p];
        const Overlap part = overlap(piece, k_begin, k_end);
        if (part.begin >= part.end) continue;
        const char* const from = place_of(piece, batch, column_begin, part.begin);
        const std::int64_t count = part.end - part.begin;
        const std::int64_t first_k = part.begin - piece.k_begin;
        if constexpr (E::unit_k == 1) {
            Unit* into = to + (part.begin - k_begin) * width;
            if (piece.outer_stride == size && columns == width) {
                with_rows(piece, from, piece.k_stride, first_k, column_begin * size, [&](const auto& source) {
                    using Rows = std::decay_t<decltype(source)>;
                    for (std::int64_t k = 0; k < count; ++k) {
                        const char* const row = Rows::at(source, k);
#pragma GCC unroll 4
                        for (int v = 0; v < vectors; ++v)
                            store(into + k * width + v * lanes<Acc>, load_units<E>(&row, v * lanes<Acc> * size));
                    }
                });
            } else if (piece.k_stride == size) {
                with_rows(piece, from, piece.outer_stride, column_begin, first_k * size,
                          [&](const auto& source) { transpose<Unit, Source>(source, columns, count, into, width); });
            } else if (piece.rows != nullptr) {
                for (std::int64_t k = 0; k < count; ++k)
                    transpose_any<Unit, Source>(piece.rows[first_k + k] + column_begin * size, size, 0, columns, 1,
                                                into + k * width, width);
            } else {
                transpose_any<Unit, Source>(from, piece.outer_stride, piece.k_stride, columns, count, into, width);
            }
        } else {
            std::int64_t k = part.begin - k_begin;
            const std::int64_t end = part.end - k_begin;
            // Half a pair: the one element of each column goes into its half of the unit.
            const auto put_half = [&](std::int64_t at) {
                std::uint16_t* half = (std::uint16_t*)(to + at / 2 * width) + at % 2;
                for (std::int64_t j = 0; j < columns; ++j)
                    half[2 * j] =
                        element<std::uint16_t, std::uint16_t>(place_of(piece, batch, column_begin + j, k_begin + at));
            };
            if (k % 2 != 0) put_half(k++);
            const std::int64_t pairs = (end - k) / 2, skipped = k - (part.begin - k_begin);
            if (piece.outer_stride == size && columns == width) {
                with_rows(piece, from + skipped * piece.k_stride, piece.k_stride, first_k + skipped,
                          column_begin * size, [&](const auto& source) {
                              using Rows = std::decay_t<decltype(source)>;
                              for (std::int64_t pair = 0; pair < pairs; ++pair) {
                                  const char* const pair_rows[2] = {Rows::at(source, 2 * pair),
                                                                    Rows::at(source, 2 * pair + 1)};
#pragma GCC unroll 4
                                  for (int v = 0; v < vectors; ++v)
                                      store(to + (k / 2 + pair) * width + v * lanes<Acc>,
                                            load_units<E>(pair_rows, v * lanes<Acc> * size));
                              }
                          });
            } else if (piece.k_stride == size) {
                with_rows(piece, from + skipped * size, piece.outer_stride, column_begin, (first_k + skipped) * size,
                          [&](const auto& source) {
                              transpose<Unit, Unit>(source, columns, pairs, to + k / 2 * width, width);
                          });
            } else {
                for (std::int64_t at = k; at < k + 2 * pairs; ++at) put_half(at);
            }
            if (k + 2 * pairs < end) put_half(k + 2 * pairs);
        }
    }
}

// The memory that will be packed next, to be fetched into the L2 cache while tiles are computed, so that packing does
// not wait. Only a guess: operands in several pieces within a pass, or with general strides, are packed without.
struct Ahead {
    const char* first;
    std::int64_t row_stride, n_rows, row_lines;
    const char* const* rows;  // the table of rows that lie anywhere, else null; then
    std::int64_t offset;      // bytes into each
    std::int64_t row, line;   // the next to be fetched
};
static constexpr Ahead nothing_ahead = {nullptr, 0, 0, 0, nullptr, 0, 0, 0};

FIVEDP_INLINE Ahead ahead_of(const Operand& operand, std::int64_t size, std::int64_t batch, std::int64_t outer_begin,
                             std::int64_t outer_count, std::int64_t k_begin, std::int64_t k_end) {
    for (std::int64_t p = 0; p < operand.n_pieces; ++p) {
        const Piece& piece = operand.pieces[p];
        if (piece.k_begin > k_begin || piece.k_end < k_end) continue;
        if (k_begin >= k_end || outer_count <= 0) break;
        const char* const from = place_of(piece, batch, outer_begin, k_begin);
        const std::int64_t first_k = k_begin - piece.k_begin, count_k = k_end - k_begin;
        const char* const* const rows = piece.rows;
        const std::int64_t outer_lines = (outer_count * size + 63) / 64, k_lines = (count_k * size + 63) / 64;
        if (piece.outer_stride == size)
            return {from,
                    piece.k_stride,
                    count_k,
                    outer_lines,
                    rows != nullptr ? rows + first_k : nullptr,
                    outer_begin * size,
                    0,
                    0};
        if (piece.k_stride == size)
            return {from,
                    piece.outer_stride,
                    outer_count,
                    k_lines,
                    rows != nullptr ? rows + outer_begin : nullptr,
                    first_k * size,
                    0,
                    0};
    }
    return nothing_ahead;
}

FIVEDP_INLINE std::int64_t lines_of(const Ahead& ahead) {
    return ahead.n_rows * ahead.row_lines;
}

// Rows of so few lines are fetched down the rows, line by line, so that runs are long; others row by row.
static constexpr std::int64_t most_lines_across = 4;

// Moves `count` lines to the list.
FIVEDP_INLINE void fetch(FetchList& list, Ahead& ahead, std::int64_t count) {
    while (count > 0 && ahead.row < ahead.n_rows && ahead.line < ahead.row_lines) {
        const bool down = ahead.rows == nullptr && ahead.row_lines <= most_lines_across;
        std::int64_t& at = down ? ahead.row : ahead.line;
        const std::int64_t end = down ? ahead.n_rows : ahead.row_lines, left = end - at;
        const char* const row =
            ahead.rows != nullptr ? ahead.rows[ahead.row] + ahead.offset : ahead.first + ahead.row * ahead.row_stride;
        // The last byte of the line's worth: where rows are unaligned, its first part came with the neighbour before.
        const std::int64_t taken =
            add_run(list, row + ahead.line * 64 + 63, down ? ahead.row_stride : 64, left < count ? left : count);
        if (taken == 0) return;
        count -= taken;
        at += taken;
        if (at == end) {
            at = 0;
            ++(down ? ahead.line : ahead.row);
        }
    }
}
