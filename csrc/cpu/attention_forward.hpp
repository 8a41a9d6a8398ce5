// Attention, forward, on one rank: adds some keys to the state of some queries, without a matrix of all logits.
//
//     queries and state into lanes
//     for each block of keys (packed once):                        4 key tiles of 84 keys
//         for each tile of queries:                                64 rows, in lanes
//             for each key tile that the mask leaves something of:
//                 logits (keys, lanes) = K q^T                     register tiles of 6 keys and 4 vectors (AVX2: 2)
//                 highest, total: vertical maximum and sum of 2^(logit - highest), in registers
//                 output (features, lanes) = output * factor + V^T weights
//                                                                  register tiles of 6 features and 4 vectors
//     state out of lanes
//
// FLOPs: 2 (size + v_size) a visible pair and head. Bytes: K and V are read once per range of queries (at most about
// `forward_rows` rows), q and the state once per call. The state is not normalised, so that a call takes up where
// another one stopped (a ring's next hop) and nothing is rounded between them.
//
// Where units are pairs of bfloat16, the weights are rounded to it as factors of the second product. Their total is the
// sum of the weights before that, and all sums are float32.
//
// The online softmax is that of Milakov and Gimelshein (2018), in blocks as in FlashAttention (Dao et al., 2022).

template <class E>
struct ForwardScratch {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    std::int64_t rows, tiles;
    Unit* queries;                                    // of the range: (tiles, units of size, lanes)
    T *output, *highest, *total;                      // likewise: (tiles, v_size, lanes), and (tiles, lanes) twice
    Unit *key_panels, *value_panels;                  // of a block: of its key tiles, one after the other
    Unit *rows_of_keys, *rows_of_lanes, *transposed;  // on the way to panels and lanes
    T* rows_of_sums;
    T* weights;
    Unit* pairs;  // of weights, where units are pairs
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

template <class E>
FIVEDP_INLINE ForwardScratch<E> forward_scratch(const AttentionProblem& problem, std::int64_t rows, char* scratch) {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    ForwardScratch<E> s;
    char* at = scratch;
    const std::int64_t row_length = staged_length(problem);
    s.rows = rows;
    s.tiles = (rows + query_tile - 1) / query_tile;
    s.queries = take<Unit>(at, s.tiles * units<E>(problem.size) * query_tile);
    s.output = take<T>(at, s.tiles * problem.v_size * query_tile);
    s.highest = take<T>(at, s.tiles * query_tile);
    s.total = take<T>(at, s.tiles * query_tile);
    s.key_panels = take<Unit>(at, 4 * key_panels_size<E>(problem.size) + slack<T>);
    s.value_panels = take<Unit>(at, 4 * feature_panels_size<E>(problem.v_size) + slack<T>);
    s.rows_of_keys = take<Unit>(at, key_units<E> * row_length + slack<T>);
    s.rows_of_lanes = take<Unit>(at, query_tile * row_length);
    s.transposed = take<Unit>(at, units<E>(problem.size) * transposed_width + slack<T>);
    s.rows_of_sums = take<T>(at, query_tile * row_length);
    s.weights = take<T>(at, key_tile * query_tile);
    s.pairs = take<Unit>(at, E::unit_k == 2 ? key_units<E> * query_tile : 0);
    s.tile = take<QueryTile<T>>(at, s.tiles);
    s.block = take<KeyBlock<T>>(at, 1);
    s.bytes = at - scratch;
    return s;
}

// Query rows of a range. The forward packs keys once for each; what the backward keeps of one should stay in cache.
static constexpr std::int64_t forward_rows = 1152, backward_rows = 576;

template <class E>
FIVEDP_NOINLINE std::int64_t attention_forward_bytes(const AttentionProblem& problem, std::int64_t rows) {
    return forward_scratch<E>(problem, rows, nullptr).bytes;
}

// The panels of a block's keys and values.
template <class E>
FIVEDP_INLINE void pack_block(const AttentionProblem& problem, const AttentionRange& range, std::int64_t first,
                              std::int64_t row_length, const ForwardScratch<E>& s) {
    for (std::int64_t begin = 0; begin < s.block->count; begin += key_tile) {
        const std::int64_t k = begin / key_tile, left = s.block->count - begin;
        const std::int64_t count = left < key_tile ? left : key_tile;
        panels_of_keys<E>(problem, problem.k, range.batch, range.kv_head, first + begin, count, problem.size,
                          s.transposed, s.key_panels + k * key_panels_size<E>(problem.size));
        stage_keys<E>(problem, problem.v, range.batch, range.kv_head, first + begin, count, problem.v_size,
                      s.rows_of_keys, row_length);
        s.block->finite[k] = !has_nonfinite<E>(s.rows_of_keys, units<E>(count), problem.v_size, row_length);
        panels_of_features<E>(s.rows_of_keys, row_length, count, problem.v_size,
                              s.value_panels + k * feature_panels_size<E>(problem.v_size));
    }
}

// Weights of a key tile, in place of its logits, and what they do to the state of the tile of queries. Returns whether
// the output is to be multiplied by `factor`.
template <class T>
FIVEDP_INLINE bool weigh(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                         std::int64_t first, KeyRange keys, Sight seen, T* logits, T* highest, T* total, T* factor) {
    using V = Vec<T>;
    const V lowest = broadcast<T>(-__builtin_inf());
    const bool plain = problem.softcap == 0 && problem.slopes == nullptr;
    bool rescale = false;
    for (int v = 0; v < tile.vectors; ++v) {
        T* const column = logits + vector_at<T>(v, key_tile, 0);
        const V before = load<V>(highest + v * lanes<T>);
        V top = before;
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
            V x = load<V>(column + j * group_lanes<T>);
            if (!plain) x = finish_logit<T>(problem, tile, v, x, block.position[first + j]);
            if (seen == Sight::some)
                x = visible<T>(problem, tile, v, block.position[first + j], block.document[first + j]) ? x : lowest;
            if (!plain || seen == Sight::some) store(column + j * group_lanes<T>, x);
            top = larger<T>(top, x);
        }
        // Rows that have seen nothing yet: -inf - -inf would be NaN.
        const V from = top == lowest ? V{} : top;
        V sum = V{};
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
            const V weight = exp2<T>(load<V>(column + j * group_lanes<T>) - from);
            store(column + j * group_lanes<T>, weight);
            sum += weight;
        }
        const V scale = exp2<T>(before - from);
        store(factor + v * lanes<T>, scale);
        store(highest + v * lanes<T>, top);
        store(total + v * lanes<T>, load<V>(total + v * lanes<T>) * scale + sum);
        for (int lane = 0; lane < lanes<T>; ++lane) rescale |= !(top[lane] == before[lane]);
    }
    return rescale;
}

// Adds the keys of `problem` to the state of the range's queries, which are in lanes.
template <class E>
FIVEDP_NOINLINE void add_keys(const AttentionProblem& problem, const AttentionRange& range,
                              const typename E::Acc* scale, const ForwardScratch<E>& s) {
    using T = typename E::Acc;
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length(problem);
    const std::int64_t depth = units<E>(size), v_step = feature_step(v_size);
    for (std::int64_t first = 0; first < problem.n_keys; first += key_block) {
        const std::int64_t left = problem.n_keys - first;
        KeyBlock<T>& block = *s.block;
        describe_keys<T>(problem, first, left < key_block ? left : key_block, block);
        bool packed = false;
        for (std::int64_t t = 0; t < s.tiles; ++t) {
            const QueryTile<T>& tile = s.tile[t];
            const std::int64_t row = t * query_tile;
            T* const output = s.output + row * v_size;
            for (std::int64_t begin = 0; begin < block.count; begin += key_tile) {
                const std::int64_t k = begin / key_tile;
                const Sight seen = sight<IndexOf<T>>(problem, tile.span, block.span[k]);
                if (seen == Sight::none) continue;
                if (!packed) {  // blocks that no query sees are not even read
                    pack_block<E>(problem, range, first, row_length, s);
                    packed = true;
                }
                KeyRange keys = {0, block.count - begin < key_tile ? block.count - begin : key_tile};
                if (seen == Sight::some) keys = seen_keys<T>(problem, tile, block, begin, keys.end);
                lane_product<E>(tile.vectors, s.key_panels + k * key_panels_size<E>(size), panel_rows, depth,
                                keys.begin, keys.end, 0, depth, s.queries + row * depth, 0, depth, s.weights, key_tile,
                                scaled_after<E> ? End::scale : End::store, scale);
                T factor[query_tile];
                const bool rescale = weigh<T>(problem, tile, block, begin, keys, seen, s.weights, s.highest + row,
                                              s.total + row, factor);
                const typename E::Unit* const weights = along_keys<E>(s.weights, keys, tile.vectors, s.pairs);
                if (seen == Sight::all || block.finite[k]) {
                    const std::int64_t unit = keys.begin / E::unit_k;
                    lane_product<E>(tile.vectors, s.value_panels + k * feature_panels_size<E>(v_size), v_step,
                                    key_units<E>, 0, v_size, unit, units<E>(keys.end) - unit, weights, unit,
                                    key_units<E>, output, v_size, rescale ? End::scale_and_add : End::add, factor);
                } else {
                    stage_keys<E>(problem, problem.v, range.batch, range.kv_head, first + begin, keys.end, v_size,
                                  s.rows_of_keys, row_length);
                    add_visible_keys<E>(problem, tile, block, begin, keys, weights, s.rows_of_keys, row_length, v_size,
                                        rescale ? factor : nullptr, output);
                }
            }
        }
    }
}

template <class E>
FIVEDP_NOINLINE void attention_forward(const AttentionProblem& problem, const AttentionRange& range, char* scratch) {
    using T = typename E::Acc;
    const std::int64_t group = problem.heads / problem.kv_heads;
    const std::int64_t rows = group * (range.query_end - range.query_begin);
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length(problem);
    const std::int64_t depth = units<E>(size);
    const ForwardScratch<E> s = forward_scratch<E>(problem, rows, scratch);
    const TokenView state = sums_view<T>(problem, problem.output, v_size);
    T* const all_highest = (T*)problem.highest;
    T* const all_total = (T*)problem.total;
    const auto flat = [&](std::int64_t row) {
        const RowAt at = row_at(problem, range, row);
        return (range.batch * problem.heads + at.head) * problem.n_queries + at.query;
    };

    T scale[query_tile];  // logits are in units of log(2)
    for (T& lane : scale) lane = (T)(problem.scale * log2_of_e);
    for (std::int64_t t = 0; t < s.tiles; ++t) {
        const std::int64_t first = t * query_tile, left = rows - first;
        const std::int64_t in_tile = left < query_tile ? left : query_tile;
        describe_tile<T>(problem, range, first, in_tile, s.tile[t]);
        to_lanes<E>(problem, problem.type, problem.q, size, range, first, in_tile, scale[0], s.rows_of_lanes,
                    row_length, s.queries + first * depth);
        to_lanes<SumsEngine<T>>(problem, sums_type<T>, state, v_size, range, first, in_tile, T(1), s.rows_of_sums,
                                row_length, s.output + first * v_size);
        for (std::int64_t row = first; row < first + query_tile; ++row) {
            s.highest[row] = row < rows ? all_highest[flat(row)] : (T)-__builtin_inf();
            s.total[row] = row < rows ? all_total[flat(row)] : T(0);
        }
    }

    for (const AttentionProblem* part = &problem; part != nullptr; part = part->next)
        add_keys<E>(*part, range, scale, s);

    for (std::int64_t first = 0; first < rows; first += query_tile) {
        const std::int64_t left = rows - first;
        from_lanes<T>(problem, state, v_size, range, first, left < query_tile ? left : query_tile,
                      s.output + first * v_size, s.rows_of_sums, row_length);
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        all_highest[flat(row)] = s.highest[row];
        all_total[flat(row)] = s.total[row];
    }
}
