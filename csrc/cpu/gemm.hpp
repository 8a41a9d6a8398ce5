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
// L2 cache, the others, between rounds, in memory. C is written once, after the last chain: by the microkernel itself
// where C is laid out for that. What a later strip or panel will need is fetched a few lines at a time while tiles are
// computed.

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

// A block of C: how it is cut, and where its sums and its packed operands lie in the scratch memory.
//
// Tiles and strips are of equal height: a last tile of a row or two would cost nearly as much as a whole one, and a
// last strip of few rows would read all of packed B for them.
template <class E>
struct Block {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    static constexpr std::int64_t tile_size = tile_rows * tile_columns<Acc>;
    static constexpr std::int64_t panel_size = tile_columns<Acc> * pass_units<E>;

    const GemmProblem& problem;
    const BlockRange& range;
    std::int64_t rows;
    Panels<Acc> panels;
    std::int64_t n_tiles, tile_height, n_strips, strip_tiles, strip_height;
    std::int64_t slot_size, strip_slot_size;
    Acc *tile, *strip_slots, *slots;
    Unit *packed_b, *packed_a;
    bool writes_c;  // the microkernel may: C's elements are sums as they are, side by side

    Block(const GemmProblem& a_problem, const BlockRange& a_range, char* scratch)
        : problem(a_problem), range(a_range), rows(a_range.m_end - a_range.m_begin) {
        panels = panels_of<Acc>(range.n_end - range.n_begin);
        n_tiles = (rows + tile_rows - 1) / tile_rows;
        tile_height = (rows + n_tiles - 1) / n_tiles;
        const std::int64_t most_tiles = problem.strip_rows / tile_rows;
        n_strips = (n_tiles + most_tiles - 1) / most_tiles;
        strip_tiles = (n_tiles + n_strips - 1) / n_strips;
        strip_height = strip_tiles * tile_height;
        slot_size = n_tiles * panels.count * tile_size;
        strip_slot_size = strip_tiles * tile_size;
        tile = (Acc*)scratch;
        strip_slots = tile + (1 + problem.n_tile_slots) * tile_size;
        slots = strip_slots + problem.n_strip_slots * strip_slot_size;
        packed_b = (Unit*)(slots + problem.n_slots * slot_size);
        packed_a = packed_b + panels.count * problem.most_passes * panel_size;
        writes_c = problem.alpha == 1 && problem.beta == 0 && problem.c.col_stride == (std::int64_t)sizeof(Acc) &&
                   problem.c.type == (sizeof(Acc) == 8 ? ElementType::f64 : ElementType::f32);
    }

    std::int64_t strip_rows(std::int64_t strip) const {
        return rows - strip * strip_height < strip_height ? rows - strip * strip_height : strip_height;
    }
    int vectors(std::int64_t panel) const { return (int)(panels.first_vector(panel + 1) - panels.first_vector(panel)); }
    Unit* strip_of(int pass) const { return packed_a + pass * strip_height * pass_units<E>; }
    // A panel that no other strip will read need not be kept: the next one takes its place.
    Unit* panel_of(std::int64_t panel, int pass) const {
        return packed_b + (n_strips > 1 ? panel * problem.most_passes + pass : 0) * panel_size;
    }
    char* place_in_c(std::int64_t row, std::int64_t column) const {
        return problem.c.data + range.batch * problem.c.batch_stride + (range.m_begin + row) * problem.c.row_stride +
               (range.n_begin + column) * problem.c.col_stride;
    }
};

// A sum that waits: where it lies for the tile at hand, how far it is to the next tile's, and whether that is so far
// away that it has to be fetched.
template <class Acc>
struct Waiting {
    Acc* at;
    std::int64_t step;
    bool far;
};

// Those that the chains of a pass take up, chain after chain, and those that they leave. Each is taken up once, so
// there are no more than were open before the pass and what its chains leave.
template <class Acc>
struct PassSums {
    Waiting<Acc> open[max_tree_depth + 2 + max_chains_per_pass], to[max_chains_per_pass];
};

template <class E>
FIVEDP_INLINE Waiting<typename E::Acc> slot_of(const Block<E>& block, std::int8_t name, std::int64_t strip,
                                               std::int64_t panel) {
    constexpr std::int64_t size = Block<E>::tile_size;
    if (name >= 0)
        return {block.slots + name * block.slot_size + (panel * block.n_tiles + strip * block.strip_tiles) * size, size,
                true};
    if (name == to_c) return {block.tile, 0, false};
    if (name > first_strip_slot) return {block.tile + (1 + first_tile_slot - name) * size, 0, false};
    return {block.strip_slots + (first_strip_slot - name) * block.strip_slot_size, size, false};
}

// What is packed next, and how many of its lines are fetched at a time.
struct Fetching {
    Ahead ahead;
    std::int64_t lines;
};

// The strip that comes next is fetched while this one is multiplied, several tiles' worth at a time, so that the list
// is seldom long and often empty.
static constexpr std::int64_t tiles_a_fetch = 4;
template <class E>
FIVEDP_INLINE Fetching strip_ahead(const Block<E>& block, std::int64_t n_round, std::int64_t strip) {
    const bool last = strip + 1 == block.n_strips;
    if (last && n_round + 1 == block.problem.n_rounds) return {nothing_ahead, 0};
    const Round &round = block.problem.rounds[n_round], &next_round = block.problem.rounds[n_round + (last ? 1 : 0)];
    const std::int64_t next = last ? 0 : strip + 1;
    const Ahead ahead = ahead_of(block.problem.a, sizeof(typename E::Source), block.range.batch,
                                 block.range.m_begin + next * block.strip_height, block.strip_rows(next),
                                 next_round.k_begin, next_round.k_end);
    const std::int64_t times = (block.strip_tiles + tiles_a_fetch - 1) / tiles_a_fetch * block.panels.count;
    return {ahead, lines_of(ahead) / (times * round.n_passes) + 1};
}

// The panel that comes next, while B is packed.
template <class E>
FIVEDP_INLINE Fetching panel_ahead(const Block<E>& block, const Round& round, std::int64_t strip, std::int64_t panel,
                                   int p) {
    const bool last_pass = p + 1 == round.n_passes;
    if (strip > 0 || (last_pass && panel + 1 == block.panels.count)) return {nothing_ahead, 0};
    const Pass& next_pass = round.passes[last_pass ? 0 : p + 1];
    const std::int64_t next = last_pass ? panel + 1 : panel;
    const Ahead ahead = ahead_of(block.problem.b, sizeof(typename E::Source), block.range.batch,
                                 block.range.n_begin + block.panels.begin(next), block.panels.width(next),
                                 next_pass.k_begin, next_pass.k_end);
    return {ahead, lines_of(ahead) / (block.strip_tiles * round.passes[p].n_chains) + 1};
}

// The tiles of a strip in a panel, over the chains of a pass.
template <class E>
FIVEDP_INLINE void multiply_pass(const Block<E>& block, const Pass& pass, bool last_pass, std::int64_t strip,
                                 std::int64_t panel, const typename E::Unit* a, const typename E::Unit* b,
                                 Fetching& next_a, Fetching& next_b) {
    using Acc = typename E::Acc;
    constexpr std::int64_t tile_lines = Block<E>::tile_size * sizeof(Acc) / 64;
    const std::int64_t height = block.tile_height, rows = block.strip_rows(strip);
    const std::int64_t column = block.panels.begin(panel), n_columns = block.panels.width(panel);
    const int vectors = block.vectors(panel);
    const std::int64_t width = vectors * lanes<Acc>, row_stride = block.problem.c.row_stride;
    const bool writes_c = block.writes_c && n_columns == width;
    const std::int64_t c_stride = block.problem.c.col_stride;
    const std::int64_t c_bytes = c_stride > 0 && c_stride <= (std::int64_t)sizeof(Acc) ? n_columns * c_stride : 1;
    const Microkernel<E> full_tile = microkernel_for<E>((int)height, vectors);

    PassSums<Acc> sums;
    Waiting<Acc>* open = sums.open;
    for (int i = 0; i < pass.n_chains; ++i) {
        const Chain& chain = pass.chains[i];
        for (int j = 0; j < chain.n_open; ++j) *open++ = slot_of(block, chain.open[j], strip, panel);
        sums.to[i] = slot_of(block, chain.to, strip, panel);
        // What the chain takes up from the same place is fetched for that.
        for (int j = 0; j < chain.n_open; ++j) sums.to[i].far &= chain.open[j] != chain.to;
    }

    FetchList fetches;
    // So fast that the next panel comes in the time of these tiles, if they are few.
    const std::int64_t chain_lines = pass.units / pass.n_chains / 2, wanted = next_b.lines / (chain_lines + 1) + 1;
    const int pace = (int)(wanted < FetchList::most_pairs ? wanted : FetchList::most_pairs);
    OpenSums<Acc> taken;
    for (std::int64_t row = 0, t = 0; row < rows; row += height, ++t, a += height * pass_units<E>) {
        const std::int64_t n_rows = rows - row < height ? rows - row : height;
        const Microkernel<E> multiply = n_rows == height ? full_tile : microkernel_for<E>((int)n_rows, vectors);
        char* const c = block.place_in_c(strip * block.strip_height + row, column);
        open = sums.open;
        for (int i = 0; i < pass.n_chains; ++i) {
            const Chain& chain = pass.chains[i];
            clear(fetches, chain.units, pace);
            taken.count = chain.n_open;
            for (int j = 0; j < chain.n_open; ++j, ++open) {
                taken.tile[j] = open->at;
                if (open->far) add_run(fetches, open->at, 64, tile_lines);
                open->at += open->step;
            }
            Waiting<Acc>& left = sums.to[i];
            SumTarget to = {(char*)left.at, width * (std::int64_t)sizeof(Acc)};
            if (left.far) add_run(fetches, left.at, 64, tile_lines);
            left.at += left.step;
            if (last_pass && i + 1 == pass.n_chains && writes_c) to = {c, row_stride};
            if (i == 0) {
                if (last_pass)
                    for (std::int64_t at = 0; at < c_bytes; at += 64) add_run(fetches, c + at, row_stride, n_rows);
                if (t % tiles_a_fetch == 0) fetch(fetches, next_a.ahead, next_a.lines);
            }
            fetch(fetches, next_b.ahead, next_b.lines);
            multiply(a + chain.unit_begin, b + chain.unit_begin * width, chain.units, taken, fetches, to);
        }
        if (last_pass && !writes_c) finish_tile(block.problem, block.tile, width, c, n_rows, n_columns);
    }
}

template <class E>
FIVEDP_NOINLINE bool gemm_block(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll) {
    const Block<E> block(problem, range, scratch);
    for (std::int64_t n_round = 0; n_round < problem.n_rounds; ++n_round) {
        const Round& round = problem.rounds[n_round];
        for (std::int64_t strip = 0; strip < block.n_strips; ++strip) {
            for (int p = 0; p < round.n_passes; ++p)
                pack_pass_a<E>(problem, round.passes[p], range.batch, range.m_begin + strip * block.strip_height,
                               block.strip_rows(strip), block.strip_of(p));
            Fetching next_a = strip_ahead(block, n_round, strip);
            for (std::int64_t panel = 0; panel < block.panels.count; ++panel) {
                for (int p = 0; p < round.n_passes; ++p) {
                    const Pass& pass = round.passes[p];
                    typename E::Unit* const b = block.panel_of(panel, p);
                    // Just before its first use, so that it is still in a near cache.
                    if (strip == 0)
                        pack_panel<E>(block.vectors(panel), problem, pass, range.batch,
                                      range.n_begin + block.panels.begin(panel), block.panels.width(panel), b);
                    Fetching next_b = panel_ahead(block, round, strip, panel, p);
                    multiply_pass(block, pass, n_round + 1 == problem.n_rounds && p + 1 == round.n_passes, strip, panel,
                                  block.strip_of(p), b, next_a, next_b);
                    if (!poll.call(poll.context)) return false;
                }
            }
        }
    }
    return true;
}
