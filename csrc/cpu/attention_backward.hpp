// Attention, backward, on one rank: what some keys and queries owe each other, from the log-sum-exp over all keys of
// all ranks and delta = rowsum(d_out * out) of the finished output.
//
//     for each group of key blocks (packed once; their d_k, d_v stay packed):      12 blocks of 336 keys
//         for each range of queries (in lanes, with their d_q), of all problems:   576 rows
//             for each block of the group, tile of queries and key tile that the mask leaves something of:
//                 weights = 2^(K q^T - log_sum)                (keys, lanes)
//                 d_logits = weights * (V d_out^T - delta)     (keys, lanes)
//                 d_v += weights d_out,  d_k += d_logits q     (keys, features)
//                 d_q += K^T d_logits                          (features, lanes)
//
// A block is packed when the first range wants it, and a range turned into lanes where it sees any of the group.
//
// FLOPs: 2 (3 size + 2 v_size) a visible pair and head. Bytes: k, v, d_k and d_v are packed once a call; q, d_out and
// d_q are turned once a group. d_q, d_k and d_v are of the type of sums and are added to: d_q gets the sums of key
// tiles in rising order, d_k and d_v those of query tiles in rising order. So a key head is one thread's.
//
// Where units are pairs of bfloat16, weights and d_logits are rounded to it once each, as factors of the last three
// products: in pairs of queries for d_k and d_v, in pairs of keys for d_q.

template <class E>
struct BackwardScratch {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    std::int64_t tiles, blocks;
    // Of a range, tile by tile: (units of size, lanes), columns of rows, and a number for each lane.
    Unit *queries, *gradients, *query_columns, *gradient_columns;
    T *d_queries, *log_sum, *log_sum_rest, *delta;
    // Of a group's blocks, key tile by key tile: panels of keys and of features, and columns of rows.
    Unit *key_panels, *key_feature_panels, *value_panels;
    T *d_keys, *d_values;
    Unit *rows_of_keys, *rows_of_lanes, *transposed;  // on the way to panels, lanes and columns
    T* rows_of_sums;
    T *weights, *d_logits;
    Unit *weight_pairs, *d_logit_pairs;  // of these, where units are pairs
    QueryTile<T>* tile;
    KeyBlock<T>* block;
    bool* packed;
    std::int64_t bytes;
};

// Blocks of keys that stay packed while all queries pass: some megabytes, to be found in the last cache.
static constexpr std::int64_t blocks_of_group = 12;

template <class E>
FIVEDP_INLINE BackwardScratch<E> backward_scratch(const AttentionProblem& problem, std::int64_t rows, char* scratch) {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    BackwardScratch<E> s;
    char* at = scratch;
    const std::int64_t row_length = staged_length(problem);
    s.tiles = (rows + query_tile - 1) / query_tile;
    s.blocks = (problem.n_keys + key_block - 1) / key_block;
    if (s.blocks > blocks_of_group) s.blocks = blocks_of_group;
    const std::int64_t all = s.tiles * query_tile, pairs = E::unit_k == 2 ? key_tile * query_tile / 2 : 0;
    s.queries = take<Unit>(at, all * units<E>(problem.size));
    s.gradients = take<Unit>(at, all * units<E>(problem.v_size));
    s.d_queries = take<T>(at, all * problem.size);
    s.query_columns = take<Unit>(at, all / E::unit_k * column_size<T>(problem.size));
    s.gradient_columns = take<Unit>(at, all / E::unit_k * column_size<T>(problem.v_size));
    s.log_sum = take<T>(at, all);
    s.log_sum_rest = take<T>(at, all);
    s.delta = take<T>(at, all);
    s.key_panels = take<Unit>(at, s.blocks * 4 * key_panels_size<E>(problem.size) + slack<T>);
    s.key_feature_panels = take<Unit>(at, s.blocks * 4 * feature_panels_size<E>(problem.size) + slack<T>);
    s.value_panels = take<Unit>(at, s.blocks * 4 * key_panels_size<E>(problem.v_size) + slack<T>);
    s.d_keys = take<T>(at, s.blocks * key_block * column_size<T>(problem.size));
    s.d_values = take<T>(at, s.blocks * key_block * column_size<T>(problem.v_size));
    s.rows_of_keys = take<Unit>(at, key_units<E> * row_length + slack<T>);
    s.rows_of_lanes = take<Unit>(at, query_tile * row_length);
    s.transposed = take<Unit>(at, units<E>(row_length) * transposed_width + slack<T>);
    s.rows_of_sums = take<T>(at, query_tile * row_length);
    s.weights = take<T>(at, key_tile * query_tile);
    s.d_logits = take<T>(at, key_tile * query_tile);
    s.weight_pairs = take<Unit>(at, pairs);
    s.d_logit_pairs = take<Unit>(at, pairs);
    s.tile = take<QueryTile<T>>(at, s.tiles);
    s.block = take<KeyBlock<T>>(at, s.blocks);
    s.packed = take<bool>(at, s.blocks);
    s.bytes = at - scratch;
    return s;
}

template <class E>
FIVEDP_NOINLINE std::int64_t attention_backward_bytes(const AttentionProblem& problem, std::int64_t rows) {
    return backward_scratch<E>(problem, rows, nullptr).bytes;
}

// x log2(e) as a sum of two numbers: a weight is 2^(logit - log_sum), whose relative error is the absolute one of the
// exponent, so half a unit of a large log-sum-exp would be felt.
template <class T>
FIVEDP_INLINE void to_log2(T x, T& whole, T& rest) {
    whole = x * (T)log2_of_e;
    const T lower = sizeof(T) == 8 ? (T)log2_of_e_rest : (T)(log2_of_e - (T)log2_of_e);
    const T rounded = sizeof(T) == 8 ? (T)__builtin_fma(x, log2_of_e, -(double)whole)
                                     : (T)((double)x * (double)(T)log2_of_e - (double)whole);
    rest = rounded + x * lower;
    if (!(rest == rest)) rest = 0;  // an infinite one has no rest
}

// weights (in place of the logits) and d_logits (in place of V d_out^T), of a key tile; masked pairs are 0 in both.
template <class T>
FIVEDP_INLINE void unweigh(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                           std::int64_t first, KeyRange keys, Sight seen, T* logits, T* d_weights, const T* log_sum,
                           const T* log_sum_rest, const T* delta) {
    using V = Vec<T>;
    const bool plain = problem.softcap == 0 && problem.slopes == nullptr;
    const V scale = broadcast<T>((T)problem.scale);
    for (int v = 0; v < tile.vectors; ++v) {
        const V sum = load<V>(log_sum + v * lanes<T>), rest = load<V>(log_sum_rest + v * lanes<T>);
        const V share = load<V>(delta + v * lanes<T>);
        for (std::int64_t j = keys.begin; j < keys.end; ++j) {
            T* const at = logits + vector_at<T>(v, key_tile, j);
            T* const d_at = d_weights + vector_at<T>(v, key_tile, j);
            V x = load<V>(at), slope = scale;
            if (!plain) {
                if (problem.softcap > 0) {  // d tanh = 1 - tanh^2
                    const V cap = broadcast<T>((T)(problem.softcap * log2_of_e));
                    const V bent = tanh_of<T>(x / cap);
                    slope = scale * (broadcast<T>(T(1)) - bent * bent);
                }
                x = finish_logit<T>(problem, tile, v, x, block.position[first + j]);
            }
            V weight = exp2<T>((x - sum) - rest);
            V d_logit = weight * (load<V>(d_at) - share) * slope;
            if (seen == Sight::some) {
                const Vec<IndexOf<T>> mask =
                    visible<T>(problem, tile, v, block.position[first + j], block.document[first + j]);
                weight = mask ? weight : V{};
                d_logit = mask ? d_logit : V{};
            }
            store(at, weight);
            store(d_at, d_logit);
        }
    }
}

// Where the gradient of a key or value is.
template <class T>
FIVEDP_INLINE T* gradient_row(const AttentionProblem& problem, const AttentionRange& range, void* d, std::int64_t key,
                              std::int64_t size) {
    return (T*)d + ((range.batch * problem.n_keys + key) * problem.kv_heads + range.kv_head) * size;
}

// Where a key tile of a group is packed: `tile` counts those of all its blocks, 4 of each.
template <class E>
struct PackedTile {
    using Unit = typename E::Unit;
    using T = typename E::Acc;
    Unit *keys, *key_features, *values;
    T *d_keys, *d_values;
};
template <class E>
FIVEDP_INLINE PackedTile<E> packed_tile(const AttentionProblem& problem, const BackwardScratch<E>& s,
                                        std::int64_t tile) {
    using T = typename E::Acc;
    return {s.key_panels + tile * key_panels_size<E>(problem.size),
            s.key_feature_panels + tile * feature_panels_size<E>(problem.size),
            s.value_panels + tile * key_panels_size<E>(problem.v_size),
            s.d_keys + tile * key_tile * column_size<T>(problem.size),
            s.d_values + tile * key_tile * column_size<T>(problem.v_size)};
}

// The panels of a block's keys and values, and the sums of their gradients so far.
template <class E>
FIVEDP_INLINE void pack_block(const AttentionProblem& problem, const AttentionRange& range, std::int64_t first,
                              std::int64_t b, const BackwardScratch<E>& s) {
    using T = typename E::Acc;
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length(problem);
    for (std::int64_t begin = 0; begin < s.block[b].count; begin += key_tile) {
        const std::int64_t k = begin / key_tile, left = s.block[b].count - begin;
        const std::int64_t count = left < key_tile ? left : key_tile;
        const PackedTile<E> packed = packed_tile(problem, s, 4 * b + k);
        stage_keys<E>(problem, problem.k, range.batch, range.kv_head, first + begin, count, size, s.rows_of_keys,
                      row_length);
        s.block[b].finite[k] = !has_nonfinite<E>(s.rows_of_keys, units<E>(count), size, row_length);
        panels_of_features<E>(s.rows_of_keys, row_length, count, size, packed.key_features);
        panels_of_keys<E>(problem, problem.k, range.batch, range.kv_head, first + begin, count, size, s.transposed,
                          packed.keys);
        panels_of_keys<E>(problem, problem.v, range.batch, range.kv_head, first + begin, count, v_size, s.transposed,
                          packed.values);
        for (std::int64_t j = 0; j < count; ++j) {
            to_columns<T>(gradient_row<T>(problem, range, problem.d_k, first + begin + j, size), j, size, key_tile,
                          packed.d_keys);
            to_columns<T>(gradient_row<T>(problem, range, problem.d_v, first + begin + j, v_size), j, v_size, key_tile,
                          packed.d_values);
        }
    }
}

// The sums of the gradients of a block's keys and values, back to where they belong.
template <class E>
FIVEDP_INLINE void unpack_gradients(const AttentionProblem& problem, const AttentionRange& range, std::int64_t first,
                                    std::int64_t b, const BackwardScratch<E>& s) {
    using T = typename E::Acc;
    for (std::int64_t j = 0; j < s.block[b].count; ++j) {
        const PackedTile<E> packed = packed_tile(problem, s, 4 * b + j / key_tile);
        from_columns<T>(packed.d_keys, j % key_tile, problem.size, key_tile,
                        gradient_row<T>(problem, range, problem.d_k, first + j, problem.size));
        from_columns<T>(packed.d_values, j % key_tile, problem.v_size, key_tile,
                        gradient_row<T>(problem, range, problem.d_v, first + j, problem.v_size));
    }
}

// Whether a range, whose tiles are described, sees any key of a group.
template <class E>
FIVEDP_INLINE bool sees_any(const AttentionProblem& problem, std::int64_t tiles, std::int64_t blocks,
                            const BackwardScratch<E>& s) {
    for (std::int64_t t = 0; t < tiles; ++t)
        for (std::int64_t b = 0; b < blocks; ++b)
            for (std::int64_t k = 0; k * key_tile < s.block[b].count; ++k)
                if (sight<IndexOf<typename E::Acc>>(problem, s.tile[t].span, s.block[b].span[k]) != Sight::none)
                    return true;
    return false;
}

// A range of queries, and all that belongs to them, into lanes and columns.
template <class E>
FIVEDP_INLINE void queries_to_lanes(const AttentionProblem& problem, const AttentionRange& range, std::int64_t rows,
                                    typename E::Acc scale, const BackwardScratch<E>& s) {
    using T = typename E::Acc;
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length(problem);
    const TokenView d_q = sums_view<T>(problem, problem.d_q, size);
    for (std::int64_t first = 0; first < rows; first += query_tile) {
        const std::int64_t left = rows - first, in_tile = left < query_tile ? left : query_tile;
        const std::int64_t first_unit = first / E::unit_k;
        QueryTile<T>& tile = s.tile[first / query_tile];
        to_lanes<E>(problem, problem.type, problem.q, size, range, first, in_tile, scale, s.rows_of_lanes, row_length,
                    s.queries + first * units<E>(size));
        tile.finite = !has_nonfinite<E>(s.rows_of_lanes, in_tile, units<E>(size), row_length);
        rows_to_columns<E>(s.rows_of_lanes, row_length, in_tile, size,
                           s.query_columns + first_unit * column_size<T>(size));
        to_lanes<E>(problem, problem.type, problem.d_out, v_size, range, first, in_tile, T(1), s.rows_of_lanes,
                    row_length, s.gradients + first * units<E>(v_size));
        tile.finite = tile.finite && !has_nonfinite<E>(s.rows_of_lanes, in_tile, units<E>(v_size), row_length);
        rows_to_columns<E>(s.rows_of_lanes, row_length, in_tile, v_size,
                           s.gradient_columns + first_unit * column_size<T>(v_size));
        to_lanes<SumsEngine<T>>(problem, sums_type<T>, d_q, size, range, first, in_tile, T(1), s.rows_of_sums,
                                row_length, s.d_queries + first * size);
        for (std::int64_t row = first; row < first + query_tile; ++row) {
            // 2^(logit - inf) is 0: for lanes without a row, and rows that see no key.
            s.log_sum[row] = __builtin_inf();
            s.log_sum_rest[row] = s.delta[row] = 0;
            if (row >= rows) continue;
            const RowAt at = row_at(problem, range, row);
            const std::int64_t flat = (range.batch * problem.heads + at.head) * problem.n_queries + at.query;
            const T sum = ((const T*)problem.log_sum)[flat];
            if (!(sum == (T)-__builtin_inf())) to_log2(sum, s.log_sum[row], s.log_sum_rest[row]);
            s.delta[row] = ((const T*)problem.delta)[flat];
        }
    }
}

// What block b of a group, which begins at key `first`, and a range of queries owe each other.
template <class E>
FIVEDP_NOINLINE void pair_with_block(const AttentionProblem& problem, const AttentionRange& range, std::int64_t tiles,
                                     std::int64_t first, std::int64_t b, const typename E::Acc* scale,
                                     const BackwardScratch<E>& s) {
    using T = typename E::Acc;
    using Unit = typename E::Unit;
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length(problem);
    const std::int64_t depth = units<E>(size), v_depth = units<E>(v_size);
    const KeyBlock<T>& block = s.block[b];
    for (std::int64_t t = 0; t < tiles; ++t) {
        const QueryTile<T>& tile = s.tile[t];
        const std::int64_t row = t * query_tile, row_unit = row / E::unit_k;
        const Unit* const query_columns = s.query_columns + row_unit * column_size<T>(size);
        const Unit* const gradient_columns = s.gradient_columns + row_unit * column_size<T>(v_size);
        T* const d_queries = s.d_queries + row * size;
        for (std::int64_t begin = 0; begin < block.count; begin += key_tile) {
            const std::int64_t k = begin / key_tile;
            const Sight seen = sight<IndexOf<T>>(problem, tile.span, block.span[k]);
            if (seen == Sight::none) continue;
            if (!s.packed[b]) {
                pack_block<E>(problem, range, first, b, s);
                s.packed[b] = true;
            }
            const PackedTile<E> packed = packed_tile(problem, s, 4 * b + k);
            KeyRange keys = {0, block.count - begin < key_tile ? block.count - begin : key_tile};
            if (seen == Sight::some) keys = seen_keys<T>(problem, tile, block, begin, keys.end);
            lane_product<E>(tile.vectors, packed.keys, panel_rows, depth, keys.begin, keys.end, 0, depth,
                            s.queries + row * depth, 0, depth, s.weights, key_tile,
                            scaled_after<E> ? End::scale : End::store, scale);
            lane_product<E>(tile.vectors, packed.values, panel_rows, v_depth, keys.begin, keys.end, 0, v_depth,
                            s.gradients + row * v_depth, 0, v_depth, s.d_logits, key_tile, End::store, nullptr);
            unweigh<T>(problem, tile, block, begin, keys, seen, s.weights, s.d_logits, s.log_sum + row,
                       s.log_sum_rest + row, s.delta + row);
            const Unit* const weights = along_lanes<E>(s.weights, keys, tile.rows, s.weight_pairs);
            const Unit* d_logits = along_lanes<E>(s.d_logits, keys, tile.rows, s.d_logit_pairs);
            if (seen == Sight::all || tile.finite) {
                column_product<E>(weights, keys.begin, keys.end, tile.rows, gradient_columns, v_size, packed.d_values);
                column_product<E>(d_logits, keys.begin, keys.end, tile.rows, query_columns, size, packed.d_keys);
            } else {
                add_visible_lanes<E>(problem, tile, block, begin, keys, weights, gradient_columns, v_size,
                                     packed.d_values);
                add_visible_lanes<E>(problem, tile, block, begin, keys, d_logits, query_columns, size, packed.d_keys);
            }
            d_logits = along_keys<E>(s.d_logits, keys, tile.vectors, s.d_logit_pairs);
            if (seen == Sight::all || block.finite[k]) {
                const std::int64_t unit = keys.begin / E::unit_k;
                lane_product<E>(tile.vectors, packed.key_features, feature_step(size), key_units<E>, 0, size, unit,
                                units<E>(keys.end) - unit, d_logits, unit, key_units<E>, d_queries, size, End::add,
                                nullptr);
            } else {
                stage_keys<E>(problem, problem.k, range.batch, range.kv_head, first + begin, keys.end, size,
                              s.rows_of_keys, row_length);
                add_visible_keys<E>(problem, tile, block, begin, keys, d_logits, s.rows_of_keys, row_length, size,
                                    nullptr, d_queries);
            }
        }
    }
}

// Of a range of queries, how many tiles of rows; they are described.
template <class E>
FIVEDP_INLINE std::int64_t describe_range(const AttentionProblem& problem, const AttentionRange& range,
                                          std::int64_t rows, const BackwardScratch<E>& s) {
    const std::int64_t tiles = (rows + query_tile - 1) / query_tile;
    for (std::int64_t t = 0; t < tiles; ++t) {
        const std::int64_t left = rows - t * query_tile;
        describe_tile<typename E::Acc>(problem, range, t * query_tile, left < query_tile ? left : query_tile,
                                       s.tile[t]);
    }
    return tiles;
}

// All queries of the heads that share a key head, `queries` of them a range; then those of the problems that follow.
template <class E>
FIVEDP_NOINLINE void attention_backward(const AttentionProblem& problem, std::int64_t batch, std::int64_t kv_head,
                                        std::int64_t queries, char* scratch) {
    using T = typename E::Acc;
    const std::int64_t group = problem.heads / problem.kv_heads;
    const BackwardScratch<E> s = backward_scratch<E>(problem, group * queries, scratch);
    T scale[query_tile];  // logits are in units of log(2)
    for (T& lane : scale) lane = (T)(problem.scale * log2_of_e);

    for (std::int64_t group_begin = 0; group_begin < problem.n_keys; group_begin += s.blocks * key_block) {
        std::int64_t blocks = 0;
        for (std::int64_t first = group_begin; blocks < s.blocks && first < problem.n_keys; first += key_block) {
            const std::int64_t left = problem.n_keys - first;
            describe_keys<T>(problem, first, left < key_block ? left : key_block, s.block[blocks]);
            s.packed[blocks++] = false;
        }
        for (const AttentionProblem* part = &problem; part != nullptr; part = part->next) {
            const TokenView d_q = sums_view<T>(*part, part->d_q, part->size);
            for (std::int64_t begin = 0; begin < part->n_queries; begin += queries) {
                const std::int64_t left_queries = part->n_queries - begin;
                const AttentionRange range = {batch, kv_head, begin,
                                              begin + (left_queries < queries ? left_queries : queries)};
                const std::int64_t rows = group * (range.query_end - range.query_begin);
                const std::int64_t tiles = describe_range<E>(*part, range, rows, s);
                if (!sees_any<E>(*part, tiles, blocks, s)) continue;
                queries_to_lanes<E>(*part, range, rows, scale[0], s);
                for (std::int64_t b = 0; b < blocks; ++b)
                    pair_with_block<E>(*part, range, tiles, group_begin + b * key_block, b, scale, s);
                for (std::int64_t first = 0; first < rows; first += query_tile) {
                    const std::int64_t left = rows - first;
                    from_lanes<T>(*part, d_q, part->size, range, first, left < query_tile ? left : query_tile,
                                  s.d_queries + first * part->size, s.rows_of_sums, staged_length(*part));
                }
            }
        }
        const AttentionRange head = {batch, kv_head, 0, problem.n_queries};
        for (std::int64_t b = 0; b < blocks; ++b)
            if (s.packed[b]) unpack_gradients<E>(problem, head, group_begin + b * key_block, b, s);
    }
}
