// One block of C: virtual shards, K blocks, panels, tiles.
//
//     for each virtual shard s, each K block of it:        # the order of the sum
//         for each strip of rows of the block:             # packed A: half of the L2 cache
//             for each panel of columns:                   # packed B: half of the L1 cache, kept for the next strips
//                 for each tile of rows:  microkernel
//
// A block's tiles of open sums (scratch, `n_slots` levels) form a binary counter: when shard s ends, its sum takes up
// as many open subtrees of equal size as s has trailing one bits, so eight shards are added as
// ((s0+s1)+(s2+s3)) + ((s4+s5)+(s6+s7)). The last shard takes up all that are left, the smallest first. Only the store
// of a shard's last K block does this, in registers; C is written once, by the last block of the last shard.

// Rows of A packed at a time: 256 KB, half of a 512 KB L2 cache.
template <class E>
static constexpr std::int64_t strip_rows =
    (256 * 1024 / (k_block * (std::int64_t)sizeof(typename E::Unit) / E::unit_k)) / tile_rows* tile_rows;

// What one K block adds to and where it goes: the binary counter.
struct BlockSum {
    std::int64_t k_begin, k_end;
    int n_open;  // levels to add, in the order of `open`
    int open[max_tree_depth + 2];
    int to;  // level to store to; -1: C
};

FIVEDP_INLINE int count_ones(std::int64_t value) {
    int ones = 0;
    for (; value != 0; value &= value - 1) ++ones;
    return ones;
}

FIVEDP_INLINE std::int64_t blocks_of_shard(const GemmProblem& problem, std::int64_t shard) {
    const std::int64_t length = problem.cuts[shard + 1] - problem.cuts[shard];
    return length > k_block ? (length + k_block - 1) / k_block : 1;  // an empty shard still adds +0
}

FIVEDP_INLINE BlockSum block_sum(const GemmProblem& problem, std::int64_t shard, std::int64_t block) {
    BlockSum sum;
    sum.k_begin = problem.cuts[shard] + block * k_block;
    sum.k_end = sum.k_begin + k_block < problem.cuts[shard + 1] ? sum.k_begin + k_block : problem.cuts[shard + 1];
    sum.n_open = 0;
    const int depth = count_ones(shard);  // open subtrees so far
    if (block > 0) sum.open[sum.n_open++] = depth;
    sum.to = depth;
    if (block + 1 == blocks_of_shard(problem, shard)) {
        const bool last = shard + 1 == problem.n_shards;
        int left = depth;
        for (std::int64_t bits = shard; left > 0 && (last || (bits & 1) != 0); bits >>= 1)
            sum.open[sum.n_open++] = --left;
        sum.to = last ? -1 : left;
    }
    return sum;
}

template <class E>
FIVEDP_NOINLINE bool gemm_block(const GemmProblem& problem, const BlockRange& range, char* scratch, const Poll& poll) {
    using Acc = typename E::Acc;
    using Unit = typename E::Unit;
    constexpr std::int64_t columns_per_tile = tile_columns<Acc>, tile_size = tile_rows * columns_per_tile;
    const std::int64_t rows = range.m_end - range.m_begin, columns = range.n_end - range.n_begin;
    const std::int64_t tiles_m = (rows + tile_rows - 1) / tile_rows;
    const std::int64_t tiles_n = (columns + columns_per_tile - 1) / columns_per_tile;
    const std::int64_t level_size = tiles_m * tiles_n * tile_size;
    Acc* const levels = (Acc*)scratch;
    Unit* const packed_b = (Unit*)(levels + problem.n_slots * level_size);
    Unit* const packed_a = packed_b + tiles_n * columns_per_tile * block_units<E>;
    const Microkernel<E> full_tile = microkernel_for<E>(tile_rows);

    for (std::int64_t shard = 0; shard < problem.n_shards; ++shard) {
        const std::int64_t n_blocks = blocks_of_shard(problem, shard);
        for (std::int64_t block = 0; block < n_blocks; ++block) {
            const BlockSum sum = block_sum(problem, shard, block);
            const std::int64_t units = (sum.k_end - sum.k_begin + E::unit_k - 1) / E::unit_k;
            OpenSums<Acc> open;
            open.count = sum.n_open;
            for (int i = 0; i < sum.n_open; ++i) open.level[i] = levels + sum.open[i] * level_size;
            Acc* const to = levels + (sum.to > 0 ? sum.to : 0) * level_size;

            for (std::int64_t strip = 0; strip < rows; strip += strip_rows<E>) {
                const std::int64_t strip_end = strip + strip_rows<E> < rows ? strip + strip_rows<E> : rows;
                pack_a<E>(problem.a, range.batch, range.m_begin + strip, strip_end - strip, sum.k_begin, sum.k_end,
                          packed_a);
                for (std::int64_t panel = 0; panel < tiles_n; ++panel) {
                    const std::int64_t column = panel * columns_per_tile;
                    const std::int64_t n_columns =
                        columns - column < columns_per_tile ? columns - column : columns_per_tile;
                    Unit* const b_panel = packed_b + column * block_units<E>;
                    // Packed just before its first use, so it is still in the L1 cache.
                    if (strip == 0)
                        pack_b<E>(problem.b, range.batch, range.n_begin + column, n_columns, sum.k_begin, sum.k_end,
                                  b_panel);
                    for (std::int64_t row = strip; row < strip_end; row += tile_rows) {
                        const std::int64_t n_rows = strip_end - row < tile_rows ? strip_end - row : tile_rows;
                        const Microkernel<E> multiply =
                            n_rows == tile_rows ? full_tile : microkernel_for<E>((int)n_rows);
                        const std::int64_t offset = (panel * tiles_m + row / tile_rows) * tile_size;
                        const Unit* const a_rows = packed_a + (row - strip) * block_units<E>;
                        if (sum.to >= 0) {
                            multiply(a_rows, b_panel, units, open, offset, to + offset);
                            continue;
                        }
                        alignas(64) Acc tile[tile_size];
                        char* const c = problem.c.data + range.batch * problem.c.batch_stride +
                                        (range.m_begin + row) * problem.c.row_stride +
                                        (range.n_begin + column) * problem.c.col_stride;
                        for (std::int64_t r = 0; r < n_rows; ++r) __builtin_prefetch(c + r * problem.c.row_stride, 1);
                        multiply(a_rows, b_panel, units, open, offset, tile);
                        for (std::int64_t r = 0; r < n_rows; ++r)
                            finish_row_as<Acc>(problem.c.type, tile + r * columns_per_tile,
                                               c + r * problem.c.row_stride, problem.c.col_stride, n_columns,
                                               problem.alpha, problem.beta);
                    }
                }
                if (!poll.call(poll.context)) return false;
            }
        }
    }
    return true;
}
