// One block of C: passes, strips, panels, tiles, chains.
//
//     for each pass:                                       # some chains of the sum: see cpu/sum_plan.hpp
//         for each strip of rows of the block:             # packed A: a quarter of the L2 cache
//             for each panel of columns:                   # packed B: half of the L1 cache, kept for the next strips
//                 for each tile of rows:
//                     for each chain of the pass: microkernel
//
// Sums that stay open between passes lie in slots of scratch, tile after tile in the order of their use. C is written
// once, by the last chain.

// Rows of A packed at a time: 144 KB, so that 128 rows of float32 are one strip.
template <class E>
static constexpr std::int64_t strip_rows =
    144 * 1024 / (pass_units<E> * (std::int64_t)sizeof(typename E::Unit)) / tile_rows* tile_rows;

template <class E>
FIVEDP_INLINE void pack_pass_a(const GemmProblem& problem, const Pass& pass, std::int64_t batch, std::int64_t row,
                               std::int64_t rows, typename E::Unit* to) {
    if (pass.together) return pack_a<E>(problem.a, batch, row, rows, pass.k_begin, pass.k_end, to);
    for (int i = 0; i < pass.n_chains; ++i)
        pack_a<E>(problem.a, batch, row, rows, pass.chains[i].k_begin, pass.chains[i].k_end,
                  to + pass.chains[i].unit_begin);
}

template <class E>
FIVEDP_INLINE void pack_pass_b(const GemmProblem& problem, const Pass& pass, std::int64_t batch, std::int64_t column,
                               std::int64_t columns, typename E::Unit* to) {
    if (pass.together) return pack_b<E>(problem.b, batch, column, columns, pass.k_begin, pass.k_end, to);
    for (int i = 0; i < pass.n_chains; ++i)
        pack_b<E>(problem.b, batch, column, columns, pass.chains[i].k_begin, pass.chains[i].k_end,
                  to + pass.chains[i].unit_begin * tile_columns<typename E::Acc>);
}

// Where the sums of one pass's chains begin and end.
template <class Acc>
struct ChainSums {
    OpenSums<Acc> open;
    Acc* to;  // the slot; for the end of the sum, the tile beside
    std::int64_t mask;
};

template <class E>
FIVEDP_NOINLINE bool gemm_block(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    constexpr std::int64_t width = tile_columns<Acc>, tile_size = tile_rows * width;
    constexpr std::int64_t size = sizeof(typename E::Source);
    const std::int64_t rows = range.m_end - range.m_begin, columns = range.n_end - range.n_begin;
    const std::int64_t tiles_m = (rows + tile_rows - 1) / tile_rows, tiles_n = (columns + width - 1) / width;
    // Tiles and strips of equal height: a last tile of a row or two would cost nearly as much as a whole one, and a
    // last strip of few rows would read all of packed B for them.
    const std::int64_t height = (rows + tiles_m - 1) / tiles_m, most_tiles = strip_rows<E> / tile_rows;
    const std::int64_t n_strips = (tiles_m + most_tiles - 1) / most_tiles;
    const std::int64_t strip_height = (tiles_m + n_strips - 1) / n_strips * height;
    const std::int64_t slot_size = tiles_m * tiles_n * tile_size;
    // Scratch: the tile and its local slots, the slots, B's panels, a strip of A.
    Acc* const tile = (Acc*)scratch;
    Acc* const slots = tile + (1 + problem.n_local_slots) * tile_size;
    Unit* const packed_b = (Unit*)(slots + problem.n_slots * slot_size);
    Unit* const packed_a = packed_b + tiles_n * width * pass_units<E>;
    const Microkernel<E> full_tile = microkernel_for<E>((int)height);
    const auto slot_of = [&](std::int8_t name) {
        return name >= 0 ? slots + name * slot_size
                         : tile + (name == to_c ? 0 : 1 + first_local_slot - name) * tile_size;
    };
    ChainSums<Acc> sums[max_chains_per_pass];

    for (std::int64_t p = 0; p < problem.n_passes; ++p) {
        const Pass& pass = problem.passes[p];
        for (int i = 0; i < pass.n_chains; ++i) {
            const Chain& chain = pass.chains[i];
            sums[i].open.count = chain.n_open;
            for (int j = 0; j < chain.n_open; ++j) {
                sums[i].open.slot[j] = slot_of(chain.open[j]);
                sums[i].open.mask[j] = chain.open[j] >= 0 ? -1 : 0;
            }
            sums[i].to = slot_of(chain.to);
            sums[i].mask = chain.to >= 0 ? -1 : 0;
        }
        const bool last_pass = p + 1 == problem.n_passes;

        for (std::int64_t strip = 0; strip < rows; strip += strip_height) {
            const std::int64_t strip_end = strip + strip_height < rows ? strip + strip_height : rows;
            const std::int64_t strip_tiles = (strip_end - strip + height - 1) / height;
            pack_pass_a<E>(problem, pass, range.batch, range.m_begin + strip, strip_end - strip, packed_a);
            // Fetch the strip that comes next while this one is multiplied.
            Ahead next_a = nothing_ahead;
            if (strip_end < rows) {
                const std::int64_t next_rows = rows - strip_end < strip_height ? rows - strip_end : strip_height;
                next_a = ahead_of(problem.a, size, range.batch, range.m_begin + strip_end, next_rows, pass.k_begin,
                                  pass.k_end);
            } else if (!last_pass) {
                next_a =
                    ahead_of(problem.a, size, range.batch, range.m_begin, rows < strip_height ? rows : strip_height,
                             problem.passes[p + 1].k_begin, problem.passes[p + 1].k_end);
            }
            const std::int64_t a_lines = lines(next_a) / (strip_tiles * tiles_n) + 1;

            for (std::int64_t panel = 0; panel < tiles_n; ++panel) {
                const std::int64_t column = panel * width;
                const std::int64_t n_columns = columns - column < width ? columns - column : width;
                // A panel that no other strip will read need not be kept: the next takes its place in the L1 cache.
                Unit* const b_panel = packed_b + (n_strips > 1 ? column * pass_units<E> : 0);
                Ahead next_b = nothing_ahead;
                // Packed just before its first use, so it is still in the L1 cache.
                if (strip == 0) {
                    pack_pass_b<E>(problem, pass, range.batch, range.n_begin + column, n_columns, b_panel);
                    if (panel + 1 < tiles_n)
                        next_b = ahead_of(problem.b, size, range.batch, range.n_begin + column + width,
                                          columns - column - width < width ? columns - column - width : width,
                                          pass.k_begin, pass.k_end);
                }
                const std::int64_t b_lines = lines(next_b) / (strip_tiles * pass.n_chains) + 1;

                for (std::int64_t row = strip; row < strip_end; row += height) {
                    const std::int64_t n_rows = strip_end - row < height ? strip_end - row : height;
                    const Microkernel<E> multiply = n_rows == height ? full_tile : microkernel_for<E>((int)n_rows);
                    const std::int64_t offset = (panel * tiles_m + row / height) * tile_size;
                    const Unit* const a_rows = packed_a + (row - strip) * pass_units<E>;
                    fetch(next_a, a_lines);
                    char* const c = problem.c.data + range.batch * problem.c.batch_stride +
                                    (range.m_begin + row) * problem.c.row_stride +
                                    (range.n_begin + column) * problem.c.col_stride;
                    if (last_pass)
                        for (std::int64_t r = 0; r < n_rows; ++r) __builtin_prefetch(c + r * problem.c.row_stride, 1);
                    for (int i = 0; i < pass.n_chains; ++i) {
                        fetch(next_b, b_lines);
                        multiply(a_rows + pass.chains[i].unit_begin, b_panel + pass.chains[i].unit_begin * width,
                                 pass.chains[i].units, sums[i].open, offset, sums[i].to + (offset & sums[i].mask));
                    }
                    if (last_pass)
                        for (std::int64_t r = 0; r < n_rows; ++r)
                            finish_row_as<Acc>(problem.c.type, tile + r * width, c + r * problem.c.row_stride,
                                               problem.c.col_stride, n_columns, problem.alpha, problem.beta);
                }
            }
            if (!poll.call(poll.context)) return false;
        }
    }
    return true;
}
