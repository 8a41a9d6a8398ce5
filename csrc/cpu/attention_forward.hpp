// Attention, forward, on one rank: adds some keys to the state of some queries, without a matrix of all logits.
//
//     for each block of keys (packed once):                        4 key tiles: panels of K, rows of V
//         for each tile of queries:                                lanes of 2 vectors
//             for each key tile that the mask leaves something of:
//                 logits = K q^T              (keys, lanes)        register tiles: rows of keys x 2 vectors
//                 highest, total: vertical maximum and sum of 2^(logit - highest), in registers
//                 output = factor * output + weights^T V           register tiles: rows of queries x 2 vectors
//
// FLOPs: 2 (size + v_size) a visible pair and head. Bytes: K and V are read once per range of queries (about
// rows_per_chunk rows), q and the state once per call. The state is not normalised, so that a call takes up where
// another one stopped (a ring's next hop) and nothing is rounded between them.
//
// The online softmax is that of Milakov and Gimelshein (2018), in blocks as in FlashAttention (Dao et al., 2022).

template <class T>
struct ForwardScratch {
    std::int64_t rows, tiles, row_length;
    T *queries, *output, *highest, *total;  // of the range: (tiles, size, lanes), (rows, row_length), (rows) twice
    T *keys, *panels, *values, *weights, *staged;  // of a block and a tile
    QueryTile<T>* tile;
    KeyBlock<T>* block;
    std::int64_t bytes;
};

template <class T>
FIVEDP_INLINE T* take(char*& at, std::int64_t count) {
    T* const here = (T*)at;
    at += (count * (std::int64_t)sizeof(T) + 63) / 64 * 64;
    return here;
}

template <class T>
FIVEDP_INLINE ForwardScratch<T> forward_scratch(const AttentionProblem& problem, std::int64_t rows, char* scratch) {
    ForwardScratch<T> s;
    char* at = scratch;
    s.rows = rows;
    s.tiles = (rows + lane_count<T> - 1) / lane_count<T>;
    s.row_length = padded<T>(problem.v_size);
    s.queries = take<T>(at, s.tiles * problem.size * lane_count<T>);
    s.output = take<T>(at, s.tiles * lane_count<T> * s.row_length);
    s.highest = take<T>(at, s.tiles * lane_count<T>);
    s.total = take<T>(at, s.tiles * lane_count<T>);
    s.keys = take<T>(at, key_block * problem.size);
    s.panels = take<T>(at, panel_room(problem.size));
    s.values = take<T>(at, key_block * s.row_length);
    s.weights = take<T>(at, key_tile * lane_count<T>);
    s.staged = take<T>(at, lane_count<T> * problem.size);
    s.tile = take<QueryTile<T>>(at, s.tiles);
    s.block = take<KeyBlock<T>>(at, 1);
    s.bytes = at - scratch;
    return s;
}

static constexpr std::int64_t attention_rows_per_chunk = 1024;

template <class T>
FIVEDP_NOINLINE std::int64_t attention_forward_bytes(const AttentionProblem& problem) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    return forward_scratch<T>(problem, attention_rows_per_chunk + group, nullptr).bytes;
}

// Queries [first, first + rows) of a range as (size, lanes), scaled.
template <class T>
FIVEDP_INLINE void pack_queries(const AttentionProblem& problem, const TokenView& view, std::int64_t size,
                                const AttentionRange& range, std::int64_t first, std::int64_t rows, T scale, T* staged,
                                T* to) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const RowAt at = row_at(problem, range, first + r);
        widen_row_as<T>(
            problem.type,
            view.data + range.batch * view.batch_stride + at.query * view.token_stride + at.head * view.head_stride,
            size, staged + r * size, size);
    }
    transpose_rows<T>(staged, size, rows, size, to, lane_count<T>, scale);
}

// Weights of a key tile, in place of its logits, and what they do to the state of the tile of queries.
template <class T>
FIVEDP_INLINE void weigh(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                         std::int64_t begin, std::int64_t count, Sight seen, T* logits, T* highest, T* total, T* output,
                         std::int64_t row_length) {
    using V = Vec<T>;
    const V lowest = broadcast<T>(-__builtin_inf());
    const bool plain = problem.softcap == 0 && problem.slopes == nullptr;
    T factor[lane_count<T>];
    bool rescale = false;
    for (int v = 0; v < tile_vectors; ++v) {
        T* const column = logits + v * lanes<T>;
        const V before = load<V>(highest + v * lanes<T>);
        V top = before;
        for (std::int64_t j = 0; j < count; ++j) {
            V x = load<V>(column + j * lane_count<T>);
            if (!plain) x = finish_logit<T>(problem, tile, v, x, block.position[begin + j]);
            if (seen == Sight::some)
                x = visible<T>(problem, tile, v, block.position[begin + j], block.document[begin + j]) ? x : lowest;
            if (!plain || seen == Sight::some) store(column + j * lane_count<T>, x);
            top = larger<T>(top, x);
        }
        // Rows that have seen nothing yet: -inf - -inf would be NaN.
        const V from = top == lowest ? V{} : top;
        V sum = V{};
        for (std::int64_t j = 0; j < count; ++j) {
            const V weight = exp2<T>(load<V>(column + j * lane_count<T>) - from);
            store(column + j * lane_count<T>, weight);
            sum += weight;
        }
        const V scale = exp2<T>(before - from);
        store(factor + v * lanes<T>, scale);
        store(highest + v * lanes<T>, top);
        store(total + v * lanes<T>, load<V>(total + v * lanes<T>) * scale + sum);
        for (int lane = 0; lane < lanes<T>; ++lane) rescale |= !(top[lane] == before[lane]);
    }
    if (!rescale) return;
    for (std::int64_t r = 0; r < tile.rows; ++r)
        if (factor[r] != T(1))
            for (std::int64_t i = 0; i < row_length; ++i) output[r * row_length + i] *= factor[r];
}

template <class T>
FIVEDP_NOINLINE void attention_forward(const AttentionProblem& problem, const AttentionRange& range, char* scratch) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    const std::int64_t rows = group * (range.query_end - range.query_begin);
    const ForwardScratch<T> s = forward_scratch<T>(problem, rows, scratch);
    T* const all_highest = (T*)problem.highest;
    T* const all_total = (T*)problem.total;
    T* const all_output = (T*)problem.output;
    const auto flat = [&](const RowAt& at) {
        return (range.batch * problem.heads + at.head) * problem.n_queries + at.query;
    };
    const auto output_row = [&](const RowAt& at) {
        return all_output + ((range.batch * problem.n_queries + at.query) * problem.heads + at.head) * problem.v_size;
    };

    for (std::int64_t t = 0; t < s.tiles; ++t) {
        const std::int64_t first = t * lane_count<T>, left = rows - first;
        const std::int64_t in_tile = left < lane_count<T> ? left : lane_count<T>;
        describe_tile<T>(problem, range, first, in_tile, s.tile[t]);
        pack_queries<T>(problem, problem.q, problem.size, range, first, in_tile, (T)(problem.scale * log2_of_e),
                        s.staged, s.queries + t * problem.size * lane_count<T>);
        for (std::int64_t lane = 0; lane < lane_count<T>; ++lane) {
            const std::int64_t row = first + lane;
            T* const output = s.output + row * s.row_length;
            s.highest[row] = -__builtin_inf();
            s.total[row] = 0;
            for (std::int64_t i = 0; i < s.row_length; ++i) output[i] = 0;
            if (lane >= in_tile) continue;
            const RowAt at = row_at(problem, range, row);
            s.highest[row] = all_highest[flat(at)];
            s.total[row] = all_total[flat(at)];
            const T* const from = output_row(at);
            for (std::int64_t i = 0; i < problem.v_size; ++i) output[i] = from[i];
        }
    }

    for (std::int64_t first = 0; first < problem.n_keys; first += key_block) {
        const std::int64_t left = problem.n_keys - first;
        KeyBlock<T>& block = *s.block;
        describe_keys<T>(problem, first, left < key_block ? left : key_block, block);
        bool packed = false;
        for (std::int64_t t = 0; t < s.tiles; ++t) {
            const QueryTile<T>& tile = s.tile[t];
            const T* const queries = s.queries + t * problem.size * lane_count<T>;
            T* const output = s.output + t * lane_count<T> * s.row_length;
            for (std::int64_t begin = 0; begin < block.count; begin += key_tile) {
                const Sight seen = sight<IndexOf<T>>(problem, tile.span, block.span[begin / key_tile]);
                if (seen == Sight::none) continue;
                if (!packed) {  // blocks that no query sees are not even read
                    pack_rows<T>(problem, problem.k, range.batch, range.kv_head, first, problem.size, block, s.keys,
                                 problem.size);
                    panels_of<T>(s.keys, problem.size, block.count, problem.size, s.panels);
                    pack_rows<T>(problem, problem.v, range.batch, range.kv_head, first, problem.v_size, block, s.values,
                                 s.row_length);
                    packed = true;
                }
                const std::int64_t count = block.count - begin < key_tile ? block.count - begin : key_tile;
                tile_against<T>(s.panels + begin / key_tile * problem.size * panel_width, count, problem.size, queries,
                                s.weights);
                weigh<T>(problem, tile, block, begin, count, seen, s.weights, s.highest + t * lane_count<T>,
                         s.total + t * lane_count<T>, output, s.row_length);
                const T* const values = s.values + begin * s.row_length;
                if (seen == Sight::all || block.finite[begin / key_tile])
                    small_product<T, 1>(tile.rows, s.row_length, count, s.weights, lane_count<T>, values, s.row_length,
                                        output, s.row_length, true);
                else
                    add_visible<T, false>(problem, tile, block, begin, count, s.weights, values, output, s.row_length);
            }
        }
    }

    for (std::int64_t row = 0; row < rows; ++row) {
        const RowAt at = row_at(problem, range, row);
        all_highest[flat(at)] = s.highest[row];
        all_total[flat(at)] = s.total[row];
        T* const to = output_row(at);
        for (std::int64_t i = 0; i < problem.v_size; ++i) to[i] = s.output[row * s.row_length + i];
    }
}
