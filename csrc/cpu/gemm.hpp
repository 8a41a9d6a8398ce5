// One block of C: rounds, strips, panels, passes, tiles, chains.
//
//     for each round:                                      # some passes of the sum: see cpu/sum_plan.hpp
//         for each strip of rows of the block:             # packed A: a quarter of the L2 cache
//             for each panel of columns:
//                 for each pass of the round:              # packed B, kept for the next strips
//                     for each tile of rows:
//                         for each chain of the pass: microkernel
//
// Sums that stay open lie in slots, tile after tile in the order of their use: those that a later pass takes up in the
// L2 cache, the others, between rounds, in memory. C is written once, by the last chain. What a later strip or panel
// will need is fetched a few lines at a time while tiles are computed.

template <class E>
FIVEDP_INLINE void pack_pass_a(const GemmProblem& problem, const Pass& pass, std::int64_t batch, std::int64_t row,
                               std::int64_t rows, typename E::Unit* to) {
    if (pass.together) return pack_a<E>(problem.a, batch, row, rows, pass.k_begin, pass.k_end, to);
    for (int i = 0; i < pass.n_chains; ++i)
        pack_a<E>(problem.a, batch, row, rows, pass.chains[i].k_begin, pass.chains[i].k_end,
                  to + pass.chains[i].unit_begin);
}

template <class E, int vectors>
FIVEDP_INLINE void pack_pass_b(const GemmProblem& problem, const Pass& pass, std::int64_t batch, std::int64_t column,
                               std::int64_t columns, typename E::Unit* to) {
    if (pass.together) return pack_b<E, vectors>(problem.b, batch, column, columns, pass.k_begin, pass.k_end, to);
    for (int i = 0; i < pass.n_chains; ++i)
        pack_b<E, vectors>(problem.b, batch, column, columns, pass.chains[i].k_begin, pass.chains[i].k_end,
                           to + pass.chains[i].unit_begin * vectors * lanes<typename E::Acc>);
}

template <class E, int most = tile_vectors>
FIVEDP_INLINE void pack_panel(int vectors, const GemmProblem& problem, const Pass& pass, std::int64_t batch,
                              std::int64_t column, std::int64_t columns, typename E::Unit* to) {
    if constexpr (most > 1)
        if (vectors < most) return pack_panel<E, most - 1>(vectors, problem, pass, batch, column, columns, to);
    pack_pass_b<E, most>(problem, pass, batch, column, columns, to);
}

// The panels of a block: as few as can be, and nearly equal in width, for a last one of a single vector would take
// nearly as long as a whole one.
template <class Acc>
struct Panels {
    std::int64_t columns, vectors, count;

    std::int64_t first_vector(std::int64_t panel) const {
        return panel * (vectors / count) + (panel < vectors % count ? panel : vectors % count);
    }
    std::int64_t begin(std::int64_t panel) const { return first_vector(panel) * lanes<Acc>; }
    std::int64_t width(std::int64_t panel) const {
        return (begin(panel + 1) < columns ? begin(panel + 1) : columns) - begin(panel);
    }
};
template <class Acc>
FIVEDP_INLINE Panels<Acc> panels_of(std::int64_t columns) {
    const std::int64_t vectors = (columns + lanes<Acc> - 1) / lanes<Acc>;
    return {columns, vectors, (vectors + tile_vectors - 1) / tile_vectors};
}

// The sums of a chain and where its own goes: the place of the first tile, and the kind of slot.
enum SlotKind { of_tile, of_strip, of_block };
template <class Acc>
struct ChainSums {
    struct Place {
        Acc* first;
        SlotKind kind;
    };
    int n_open;
    Place open[max_tree_depth + 2], to;
};

template <class E>
FIVEDP_NOINLINE bool gemm_block(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    constexpr std::int64_t tile_size = tile_rows * tile_columns<Acc>, tile_lines = tile_size * sizeof(Acc) / 64;
    constexpr std::int64_t size = sizeof(typename E::Source), panel_size = tile_columns<Acc> * pass_units<E>;
    const std::int64_t rows = range.m_end - range.m_begin;
    const Panels<Acc> panels = panels_of<Acc>(range.n_end - range.n_begin);
    // Tiles and strips of equal height: a last tile of a row or two would cost nearly as much as a whole one, and a
    // last strip of few rows would read all of packed B for them.
    const std::int64_t tiles_m = (rows + tile_rows - 1) / tile_rows, most_tiles = problem.strip_rows / tile_rows;
    const std::int64_t height = (rows + tiles_m - 1) / tiles_m;
    const std::int64_t n_strips = (tiles_m + most_tiles - 1) / most_tiles;
    const std::int64_t tiles_a_strip = (tiles_m + n_strips - 1) / n_strips, strip_height = tiles_a_strip * height;
    const std::int64_t slot_size = tiles_m * panels.count * tile_size, strip_slot_size = tiles_a_strip * tile_size;
    // Scratch: the tile and its slots, a strip's slots, the slots, B's panels, a strip of A.
    Acc* const tile = (Acc*)scratch;
    Acc* const strip_slots = tile + (1 + problem.n_tile_slots) * tile_size;
    Acc* const slots = strip_slots + problem.n_strip_slots * strip_slot_size;
    Unit* const packed_b = (Unit*)(slots + problem.n_slots * slot_size);
    Unit* const packed_a = packed_b + panels.count * problem.most_passes * panel_size;
    const std::int64_t strip_size = strip_height * pass_units<E>;
    using Place = typename ChainSums<Acc>::Place;
    const auto place_of_slot = [&](std::int8_t name) -> Place {
        if (name >= 0) return {slots + name * slot_size, of_block};
        if (name == to_c) return {tile, of_tile};
        if (name > first_strip_slot) return {tile + (1 + first_tile_slot - name) * tile_size, of_tile};
        return {strip_slots + (first_strip_slot - name) * strip_slot_size, of_strip};
    };
    ChainSums<Acc> sums[FIVEDP_ROUND_PASSES][max_chains_per_pass];
    OpenSums<Acc> open;
    FetchList fetches;

    for (std::int64_t n_round = 0; n_round < problem.n_rounds; ++n_round) {
        const Round& round = problem.rounds[n_round];
        const bool last_round = n_round + 1 == problem.n_rounds;
        for (int p = 0; p < round.n_passes; ++p) {
            for (int i = 0; i < round.passes[p].n_chains; ++i) {
                const Chain& chain = round.passes[p].chains[i];
                sums[p][i].n_open = chain.n_open;
                for (int j = 0; j < chain.n_open; ++j) sums[p][i].open[j] = place_of_slot(chain.open[j]);
                sums[p][i].to = place_of_slot(chain.to);
            }
        }
        for (std::int64_t strip = 0; strip < rows; strip += strip_height) {
            const std::int64_t strip_end = strip + strip_height < rows ? strip + strip_height : rows;
            const std::int64_t strip_tile = strip / height, strip_tiles = (strip_end - strip + height - 1) / height;
            for (int p = 0; p < round.n_passes; ++p)
                pack_pass_a<E>(problem, round.passes[p], range.batch, range.m_begin + strip, strip_end - strip,
                               packed_a + p * strip_size);
            // The strip that comes next is fetched while this one is multiplied.
            Ahead next_a = nothing_ahead;
            if (strip_end < rows) {
                const std::int64_t next_rows = rows - strip_end < strip_height ? rows - strip_end : strip_height;
                next_a = ahead_of(problem.a, size, range.batch, range.m_begin + strip_end, next_rows, round.k_begin,
                                  round.k_end);
            } else if (!last_round) {
                next_a =
                    ahead_of(problem.a, size, range.batch, range.m_begin, rows < strip_height ? rows : strip_height,
                             problem.rounds[n_round + 1].k_begin, problem.rounds[n_round + 1].k_end);
            }
            // Several tiles' worth at a time, so that the list is seldom long and often empty.
            constexpr std::int64_t a_tiles = 4;
            const std::int64_t a_lines =
                lines_of(next_a) / ((strip_tiles + a_tiles - 1) / a_tiles * panels.count * round.n_passes) + 1;

            for (std::int64_t panel = 0; panel < panels.count; ++panel) {
                const std::int64_t column = panels.begin(panel), n_columns = panels.width(panel);
                const int vectors = (int)(panels.first_vector(panel + 1) - panels.first_vector(panel));
                const std::int64_t width = vectors * lanes<Acc>;
                const Microkernel<E> full_tile = microkernel_for<E>((int)height, vectors);
                for (int p = 0; p < round.n_passes; ++p) {
                    const Pass& pass = round.passes[p];
                    const ChainSums<Acc>* const pass_sums = sums[p];
                    const bool last_pass = last_round && p + 1 == round.n_passes;
                    // A panel that no other strip will read need not be kept: the next one takes its place.
                    Unit* const b_panel = packed_b + (n_strips > 1 ? panel * problem.most_passes + p : 0) * panel_size;
                    Ahead next_b = nothing_ahead;
                    if (strip == 0) {
                        // Just before its first use, so that it is still in a near cache.
                        pack_panel<E>(vectors, problem, pass, range.batch, range.n_begin + column, n_columns, b_panel);
                        if (p + 1 < round.n_passes)
                            next_b = ahead_of(problem.b, size, range.batch, range.n_begin + column, n_columns,
                                              round.passes[p + 1].k_begin, round.passes[p + 1].k_end);
                        else if (panel + 1 < panels.count)
                            next_b = ahead_of(problem.b, size, range.batch, range.n_begin + panels.begin(panel + 1),
                                              panels.width(panel + 1), round.passes[0].k_begin, round.passes[0].k_end);
                    }
                    const std::int64_t b_lines = lines_of(next_b) / (strip_tiles * pass.n_chains) + 1;

                    for (std::int64_t t = 0; t < strip_tiles; ++t) {
                        const std::int64_t row = strip + t * height;
                        const std::int64_t n_rows = strip_end - row < height ? strip_end - row : height;
                        const Microkernel<E> multiply =
                            n_rows == height ? full_tile : microkernel_for<E>((int)n_rows, vectors);
                        // By the kind of slot.
                        const std::int64_t offsets[] = {0, t * tile_size,
                                                        (panel * tiles_m + strip_tile + t) * tile_size};
                        const Unit* const a_rows = packed_a + p * strip_size + t * height * pass_units<E>;
                        char* const c = problem.c.data + range.batch * problem.c.batch_stride +
                                        (range.m_begin + row) * problem.c.row_stride +
                                        (range.n_begin + column) * problem.c.col_stride;
                        for (int i = 0; i < pass.n_chains; ++i) {
                            const Chain& chain = pass.chains[i];
                            const ChainSums<Acc>& sum = pass_sums[i];
                            clear(fetches, chain.units);
                            open.count = sum.n_open;
                            for (int j = 0; j < open.count; ++j) {
                                const Place& place = sum.open[j];
                                open.tile[j] = place.first + offsets[place.kind];
                                if (place.kind == of_block) add_run(fetches, open.tile[j], 64, tile_lines);
                            }
                            Acc* const to = sum.to.first + offsets[sum.to.kind];
                            if (sum.to.kind == of_block && (open.count == 0 || open.tile[open.count - 1] != to))
                                add_run(fetches, to, 64, tile_lines);
                            if (last_pass && i == 0) add_run(fetches, c, problem.c.row_stride, n_rows);
                            if (i == 0 && t % a_tiles == 0) fetch(fetches, next_a, a_lines);
                            fetch(fetches, next_b, b_lines);
                            multiply(a_rows + chain.unit_begin, b_panel + chain.unit_begin * width, chain.units, open,
                                     fetches, to);
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
    }
    return true;
}
