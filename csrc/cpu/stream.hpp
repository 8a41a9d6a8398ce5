// A few rows of A against a large B that lies contiguous along n (decoding): B is read once, where it lies.
//
// The sums of a strip of columns stay in the L1 cache while rows of B pass by, four at a time; each element is the same
// chain in the same order as in the tiled kernel. The strip is as wide as the cache allows, so that the rows of B are
// read in long runs. Rows that come later are fetched into the L2 cache meanwhile, for no run is so long that the
// hardware would keep ahead; every group of rows of A fetches its part of them, so that memory does not rest.

// Rows of A multiplied at a time, so that their 4 numbers each stay in registers.
static constexpr int stream_group = FIVEDP_VECTOR_BYTES >= 64 ? 4 : 2;
static constexpr int stream_depth = 4;
// With more rows packing B costs less than reading their sums again and again.
static constexpr int stream_most_rows = FIVEDP_VECTOR_BYTES >= 64 ? 10 : 8;
// How many times stream_depth ahead rows of B are fetched.
static constexpr int stream_ahead = 3;

// Rows of B that come later, to be fetched. A missing half of a last pair is null, and fetching there does no harm.
struct NextRows {
    const char* const* rows;
    int count;
};

// Units u_begin <= u < u_begin + depth of `rows` rows of A times the same rows of B, added to sums[row][column], while
// the same columns of `next` are fetched.
template <class E, int rows, int depth>
FIVEDP_INLINE void stream_rows(const typename E::Unit* a, const char* const* b_rows, NextRows next,
                               std::int64_t columns, typename E::Acc* sums, std::int64_t row_length) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using V = Vec<Acc>;
    constexpr int width = lanes<Acc>;
    constexpr std::int64_t size = sizeof(typename E::Source);
    Vec<Unit> factor[rows][depth];
    for (int r = 0; r < rows; ++r)
        for (int d = 0; d < depth; ++d) factor[r][d] = broadcast<Unit>(a[r * pass_units<E> + d]);
    const std::int64_t whole = columns / width * width;
    for (std::int64_t j = 0; j < whole; j += width) {
        V sum[rows];
        for (int r = 0; r < rows; ++r) sum[r] = load<V>(sums + r * row_length + j);
        for (int i = 0; i < next.count; ++i)
            __builtin_prefetch((const void*)((std::uintptr_t)next.rows[i] + (std::uintptr_t)(j * size)), 0, 2);
#pragma GCC unroll 4
        for (int d = 0; d < depth; ++d) {
            const Vec<Unit> b = load_units<E>(b_rows + E::unit_k * d, j * size);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) sum[r] = E::multiply_add(factor[r][d], b, sum[r]);
        }
        for (int r = 0; r < rows; ++r) store(sums + r * row_length + j, sum[r]);
    }
    if (whole < columns) {
        // The last columns through a buffer: nothing is read beyond the rows of B. `sums` has room for whole vectors.
        V sum[rows];
        for (int r = 0; r < rows; ++r) sum[r] = load<V>(sums + r * row_length + whole);
        for (int d = 0; d < depth; ++d) {
            typename E::Source tail[E::unit_k][width] = {};
            const char* tail_rows[E::unit_k];
            for (int h = 0; h < E::unit_k; ++h) {
                const char* row = b_rows[E::unit_k * d + h];
                if (row != nullptr) __builtin_memcpy(tail[h], row + whole * size, (columns - whole) * size);
                tail_rows[h] = row != nullptr ? (const char*)tail[h] : nullptr;
            }
            const Vec<Unit> b = load_units<E>(tail_rows, 0);
            for (int r = 0; r < rows; ++r) sum[r] = E::multiply_add(factor[r][d], b, sum[r]);
        }
        for (int r = 0; r < rows; ++r) store(sums + r * row_length + whole, sum[r]);
    }
}

// The same for up to stream_depth units.
template <class E, int rows>
FIVEDP_NOINLINE void stream_group_rows(const typename E::Unit* a, const char* const* b_rows, NextRows next,
                                       std::int64_t units, std::int64_t columns, typename E::Acc* sums,
                                       std::int64_t row_length) {
    if (units == stream_depth) return stream_rows<E, rows, stream_depth>(a, b_rows, next, columns, sums, row_length);
    for (std::int64_t u = 0; u < units; ++u)
        stream_rows<E, rows, 1>(a + u, b_rows + E::unit_k * u, {nullptr, 0}, columns, sums, row_length);
}

template <class E>
FIVEDP_INLINE void stream_any(int rows, const typename E::Unit* a, const char* const* b_rows, NextRows next,
                              std::int64_t units, std::int64_t columns, typename E::Acc* sums,
                              std::int64_t row_length) {
    if (rows == 1) return stream_group_rows<E, 1>(a, b_rows, next, units, columns, sums, row_length);
    if (rows == 2 || stream_group == 2)
        return stream_group_rows<E, 2>(a, b_rows, next, units, columns, sums, row_length);
    if (rows == 3)
        return stream_group_rows < E, stream_group == 2 ? 2 : 3 > (a, b_rows, next, units, columns, sums, row_length);
    stream_group_rows<E, stream_group>(a, b_rows, next, units, columns, sums, row_length);
}

// The pointers to rows k_begin <= k < k_end of B at a column; the missing half of a last pair is null.
template <class E>
FIVEDP_INLINE void rows_of_b(const Operand& b, std::int64_t batch, std::int64_t column, std::int64_t k_begin,
                             std::int64_t k_end, const char** rows) {
    for (std::int64_t p = 0; p < b.n_pieces; ++p) {
        const Piece& piece = b.pieces[p];
        const Overlap part = overlap(piece, k_begin, k_end);
        const std::int64_t count = part.end - part.begin;
        if (count <= 0) continue;
        const char** const to = rows + (part.begin - k_begin);
        const char* const first = place_of(piece, batch, column, part.begin);
        with_rows(piece, first, piece.k_stride, part.begin - piece.k_begin, column * piece.outer_stride,
                  [&](const auto& source) {
                      for (std::int64_t k = 0; k < count; ++k) to[k] = std::decay_t<decltype(source)>::at(source, k);
                  });
    }
    if ((k_end - k_begin) % E::unit_k != 0) rows[k_end - k_begin] = nullptr;
}

// All rows of the product (range.m_begin is 0) and some of its columns.
template <class E>
FIVEDP_NOINLINE bool stream_block(const GemmProblem& problem, const BlockRange& range, char* scratch,
                                  const Poll& poll) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    using V = Vec<Acc>;
    constexpr std::int64_t width = lanes<Acc>;
    const std::int64_t rows = range.m_end - range.m_begin, columns = range.n_end - range.n_begin;
    const std::int64_t row_length = (columns + width - 1) / width * width, slot_size = rows * row_length;
    // Scratch: the current chain's sums, the slots of all kinds, the rows of A.
    Acc* const sums = (Acc*)scratch;
    Acc* const tile_slots = sums + slot_size;
    Acc* const strip_slots = tile_slots + problem.n_tile_slots * slot_size;
    Acc* const slots = strip_slots + problem.n_strip_slots * slot_size;
    Unit* const packed_a = (Unit*)(slots + problem.n_slots * slot_size);
    const auto slot_of = [&](std::int8_t name) {
        if (name >= 0) return slots + name * slot_size;
        return name > first_strip_slot ? tile_slots + (first_tile_slot - name) * slot_size
                                       : strip_slots + (first_strip_slot - name) * slot_size;
    };
    constexpr int n_at_hand = E::unit_k * stream_depth;
    const int groups = (int)((rows + stream_group - 1) / stream_group);
    const char* row_lists[2][k_block + 2];  // of this chain and of the next
    const char** b_rows = row_lists[0];
    const char** next_rows = row_lists[1];
    const auto find_rows = [&](const Chain& chain, const char** to) {
        rows_of_b<E>(problem.b, range.batch, range.n_begin, chain.k_begin, chain.k_end, to);
    };

    // The chains of all rounds lie one after the other.
    const Chain* const first = problem.rounds[0].passes[0].chains;
    const Round& last_round = problem.rounds[problem.n_rounds - 1];
    const Pass& last_pass = last_round.passes[last_round.n_passes - 1];
    const Chain* const end_of_chains = last_pass.chains + last_pass.n_chains;
    find_rows(*first, b_rows);
    for (const Chain* at = first; at != end_of_chains; ++at) {
        const Chain& chain = *at;
        const std::int64_t next_units = at + 1 != end_of_chains ? at[1].units : 0;
        if (next_units != 0) find_rows(at[1], next_rows);
        pack_a<E>(problem.a, range.batch, range.m_begin, rows, chain.k_begin, chain.k_end, packed_a);
        for (std::int64_t j = 0; j < slot_size; j += width) store(sums + j, V{});
        // A few rows of B for all rows of A, so that B is read from memory once.
        for (std::int64_t u = 0; u < chain.units; u += stream_depth) {
            const std::int64_t units = chain.units - u < stream_depth ? chain.units - u : stream_depth;
            const std::int64_t ahead = u + stream_ahead * stream_depth, beyond = ahead - chain.units;
            NextRows next = {nullptr, 0};
            if (beyond + stream_depth <= 0)
                next = {b_rows + E::unit_k * ahead, n_at_hand};
            else if (beyond >= 0 && beyond + stream_depth <= next_units)
                next = {next_rows + E::unit_k * beyond, n_at_hand};
            for (int group = 0; group < groups; ++group) {
                const std::int64_t row = rows * group / groups;
                const int begin = next.count * group / groups, end = next.count * (group + 1) / groups;
                stream_any<E>((int)(rows * (group + 1) / groups - row), packed_a + row * pass_units<E> + u,
                              b_rows + E::unit_k * u, {next.rows + begin, end - begin}, units, columns,
                              sums + row * row_length, row_length);
            }
        }
        for (int o = 0; o < chain.n_open; ++o) {
            const Acc* open = slot_of(chain.open[o]);
            for (std::int64_t j = 0; j < slot_size; j += width) store(sums + j, load<V>(open + j) + load<V>(sums + j));
        }
        if (chain.to == to_c) {
            for (std::int64_t r = 0; r < rows; ++r)
                finish_row_as<Acc>(problem.c.type, sums + r * row_length,
                                   problem.c.data + range.batch * problem.c.batch_stride +
                                       (range.m_begin + r) * problem.c.row_stride +
                                       range.n_begin * problem.c.col_stride,
                                   problem.c.col_stride, columns, problem.alpha, problem.beta);
        } else {
            Acc* const to = slot_of(chain.to);
            for (std::int64_t j = 0; j < slot_size; j += width) store(to + j, load<V>(sums + j));
        }
        if (!poll.call(poll.context)) return false;
        const char** const done = b_rows;
        b_rows = next_rows;
        next_rows = done;
    }
    return true;
}
