// Attention, backward, on one rank: what some keys and queries owe each other, from the log-sum-exp over all keys of
// all ranks and delta = rowsum(d_out * out) of the finished output.
//
//     for each block of keys (packed once; its d_k, d_v stay packed):
//         for each tile of queries:
//             for each key tile that the mask leaves something of:
//                 weights = 2^(K q^T - log_sum)                (keys, lanes)
//                 d_logits = weights * (V d_out^T - delta)     (keys, lanes)
//                 d_v += weights d_out,  d_k += d_logits q,  d_q += d_logits^T K
//
// FLOPs: 2 (3 size + 2 v_size) a visible pair and head. d_q, d_k and d_v are sums of the type of sums and are added to,
// keys in rising order for d_q, queries in rising order for d_k and d_v: an element's sum is one chain, however the
// keys and queries are cut. So ranges of one key head come one after the other, never at the same time.

template <class T>
struct BackwardScratch {
    std::int64_t rows, tiles, row_length, v_row_length;
    T *queries, *gradients;         // transposed: (tiles, size, lanes)
    T *query_rows, *gradient_rows;  // (tiles * lanes, row_length)
    T *d_queries, *log_sum, *delta;
    T *keys, *key_panels, *value_rows, *value_panels, *d_keys, *d_values, *weights, *d_logits, *staged;
    QueryTile<T>* tile;
    KeyBlock<T>* block;
    std::int64_t bytes;
};

template <class T>
FIVEDP_INLINE BackwardScratch<T> backward_scratch(const AttentionProblem& problem, std::int64_t rows, char* scratch) {
    BackwardScratch<T> s;
    char* at = scratch;
    s.rows = rows;
    s.tiles = (rows + lane_count<T> - 1) / lane_count<T>;
    const std::int64_t all = s.tiles * lane_count<T>;
    s.row_length = padded<T>(problem.size);
    s.v_row_length = padded<T>(problem.v_size);
    s.queries = take<T>(at, all * problem.size);
    s.gradients = take<T>(at, all * problem.v_size);
    s.query_rows = take<T>(at, all * s.row_length);
    s.gradient_rows = take<T>(at, all * s.v_row_length);
    s.d_queries = take<T>(at, all * s.row_length);
    s.log_sum = take<T>(at, all);
    s.delta = take<T>(at, all);
    s.keys = take<T>(at, key_block * s.row_length);
    s.key_panels = take<T>(at, panel_room(problem.size));
    s.value_rows = take<T>(at, key_block * problem.v_size);
    s.value_panels = take<T>(at, panel_room(problem.v_size));
    s.d_keys = take<T>(at, key_block * s.row_length);
    s.d_values = take<T>(at, key_block * s.v_row_length);
    s.weights = take<T>(at, key_tile * lane_count<T>);
    s.d_logits = take<T>(at, key_tile * lane_count<T>);
    s.staged = take<T>(at, lane_count<T> * (problem.size > problem.v_size ? problem.size : problem.v_size));
    s.tile = take<QueryTile<T>>(at, s.tiles);
    s.block = take<KeyBlock<T>>(at, 1);
    s.bytes = at - scratch;
    return s;
}

template <class T>
FIVEDP_NOINLINE std::int64_t attention_backward_bytes(const AttentionProblem& problem) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    return backward_scratch<T>(problem, attention_rows_per_chunk + group, nullptr).bytes;
}

// weights (in place of the logits) and d_logits (in place of V d_out^T), of a key tile; masked pairs are 0 in both.
template <class T>
FIVEDP_INLINE void unweigh(const AttentionProblem& problem, const QueryTile<T>& tile, const KeyBlock<T>& block,
                           std::int64_t begin, std::int64_t count, Sight seen, T* logits, T* d_weights,
                           const T* log_sum, const T* delta) {
    using V = Vec<T>;
    const bool plain = problem.softcap == 0 && problem.slopes == nullptr;
    const V scale = broadcast<T>((T)problem.scale);
    for (int v = 0; v < tile_vectors; ++v) {
        const V sum = load<V>(log_sum + v * lanes<T>), share = load<V>(delta + v * lanes<T>);
        for (std::int64_t j = 0; j < count; ++j) {
            T* const at = logits + j * lane_count<T> + v * lanes<T>;
            T* const d_at = d_weights + j * lane_count<T> + v * lanes<T>;
            V x = load<V>(at), slope = scale;
            if (!plain) {
                if (problem.softcap > 0) {  // d tanh = 1 - tanh^2
                    const V cap = broadcast<T>((T)(problem.softcap * log2_of_e));
                    const V bent = tanh_of<T>(x / cap);
                    slope = scale * (broadcast<T>(T(1)) - bent * bent);
                }
                x = finish_logit<T>(problem, tile, v, x, block.position[begin + j]);
            }
            V weight = exp2<T>(x - sum);
            V d_logit = weight * (load<V>(d_at) - share) * slope;
            if (seen == Sight::some) {
                const Vec<IndexOf<T>> mask =
                    visible<T>(problem, tile, v, block.position[begin + j], block.document[begin + j]);
                weight = mask ? weight : V{};
                d_logit = mask ? d_logit : V{};
            }
            store(at, weight);
            store(d_at, d_logit);
        }
    }
}

template <class T>
FIVEDP_NOINLINE void attention_backward(const AttentionProblem& problem, const AttentionRange& range, char* scratch) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    const std::int64_t rows = group * (range.query_end - range.query_begin);
    const BackwardScratch<T> s = backward_scratch<T>(problem, rows, scratch);
    const T* const all_log_sum = (const T*)problem.log_sum;
    const T* const all_delta = (const T*)problem.delta;
    T* const all_d_q = (T*)problem.d_q;
    const auto flat = [&](const RowAt& at) {
        return (range.batch * problem.heads + at.head) * problem.n_queries + at.query;
    };
    const auto d_q_row = [&](const RowAt& at) {
        return all_d_q + ((range.batch * problem.n_queries + at.query) * problem.heads + at.head) * problem.size;
    };

    for (std::int64_t t = 0; t < s.tiles; ++t) {
        const std::int64_t first = t * lane_count<T>, left = rows - first;
        const std::int64_t in_tile = left < lane_count<T> ? left : lane_count<T>;
        describe_tile<T>(problem, range, first, in_tile, s.tile[t]);
        pack_queries<T>(problem, problem.q, problem.size, range, first, in_tile, (T)(problem.scale * log2_of_e),
                        s.staged, s.queries + first * problem.size);
        for (std::int64_t lane = 0; lane < lane_count<T>; ++lane) {
            T* const to = s.query_rows + (first + lane) * s.row_length;
            for (std::int64_t i = 0; i < s.row_length; ++i)
                to[i] = lane < in_tile && i < problem.size ? s.staged[lane * problem.size + i] : T(0);
        }
        pack_queries<T>(problem, problem.d_out, problem.v_size, range, first, in_tile, T(1), s.staged,
                        s.gradients + first * problem.v_size);
        for (std::int64_t lane = 0; lane < lane_count<T>; ++lane) {
            const std::int64_t row = first + lane;
            T* const to = s.gradient_rows + row * s.v_row_length;
            for (std::int64_t i = 0; i < s.v_row_length; ++i)
                to[i] = lane < in_tile && i < problem.v_size ? s.staged[lane * problem.v_size + i] : T(0);
            T* const d_to = s.d_queries + row * s.row_length;
            for (std::int64_t i = 0; i < s.row_length; ++i) d_to[i] = 0;
            // 2^(logit - inf) is 0: for lanes without a row, and rows that see no key.
            s.log_sum[row] = __builtin_inf();
            s.delta[row] = 0;
            if (lane >= in_tile) continue;
            const RowAt at = row_at(problem, range, row);
            const T sum = all_log_sum[flat(at)];
            if (!(sum == (T)-__builtin_inf())) s.log_sum[row] = sum * (T)log2_of_e;
            s.delta[row] = all_delta[flat(at)];
            const T* const from = d_q_row(at);
            for (std::int64_t i = 0; i < problem.size; ++i) d_to[i] = from[i];
        }
        s.tile[t].finite = !has_nonfinite(s.query_rows + first * s.row_length, in_tile * s.row_length) &&
                           !has_nonfinite(s.gradient_rows + first * s.v_row_length, in_tile * s.v_row_length);
    }

    const auto d_row = [&](void* d, std::int64_t key, std::int64_t size) {
        return (T*)d + ((range.batch * problem.n_keys + key) * problem.kv_heads + range.kv_head) * size;
    };
    for (std::int64_t first = 0; first < problem.n_keys; first += key_block) {
        const std::int64_t left_keys = problem.n_keys - first;
        KeyBlock<T>& block = *s.block;
        describe_keys<T>(problem, first, left_keys < key_block ? left_keys : key_block, block);
        bool packed = false;
        for (std::int64_t t = 0; t < s.tiles; ++t) {
            const QueryTile<T>& tile = s.tile[t];
            const std::int64_t row = t * lane_count<T>;
            for (std::int64_t begin = 0; begin < block.count; begin += key_tile) {
                const Sight seen = sight<IndexOf<T>>(problem, tile.span, block.span[begin / key_tile]);
                if (seen == Sight::none) continue;
                if (!packed) {
                    pack_rows<T>(problem, problem.k, range.batch, range.kv_head, first, problem.size, block, s.keys,
                                 s.row_length);
                    panels_of<T>(s.keys, s.row_length, block.count, problem.size, s.key_panels);
                    pack_rows<T>(problem, problem.v, range.batch, range.kv_head, first, problem.v_size, block,
                                 s.value_rows, problem.v_size);
                    panels_of<T>(s.value_rows, problem.v_size, block.count, problem.v_size, s.value_panels);
                    for (std::int64_t j = 0; j < block.count; ++j) {
                        const T* const k_from = d_row(problem.d_k, first + j, problem.size);
                        const T* const v_from = d_row(problem.d_v, first + j, problem.v_size);
                        for (std::int64_t i = 0; i < s.row_length; ++i)
                            s.d_keys[j * s.row_length + i] = i < problem.size ? k_from[i] : T(0);
                        for (std::int64_t i = 0; i < s.v_row_length; ++i)
                            s.d_values[j * s.v_row_length + i] = i < problem.v_size ? v_from[i] : T(0);
                    }
                    packed = true;
                }
                const std::int64_t count = block.count - begin < key_tile ? block.count - begin : key_tile;
                tile_against<T>(s.key_panels + begin / key_tile * problem.size * panel_width, count, problem.size,
                                s.queries + row * problem.size, s.weights);
                tile_against<T>(s.value_panels + begin / key_tile * problem.v_size * panel_width, count, problem.v_size,
                                s.gradients + row * problem.v_size, s.d_logits);
                unweigh<T>(problem, tile, block, begin, count, seen, s.weights, s.d_logits, s.log_sum + row,
                           s.delta + row);
                const T* const query_rows = s.query_rows + row * s.row_length;
                const T* const gradient_rows = s.gradient_rows + row * s.v_row_length;
                T* const d_keys = s.d_keys + begin * s.row_length;
                T* const d_values = s.d_values + begin * s.v_row_length;
                if (seen == Sight::all || tile.finite) {
                    small_product<T, (int)lane_count<T>>(count, s.v_row_length, tile.rows, s.weights, 1, gradient_rows,
                                                         s.v_row_length, d_values, s.v_row_length, true);
                    small_product<T, (int)lane_count<T>>(count, s.row_length, tile.rows, s.d_logits, 1, query_rows,
                                                         s.row_length, d_keys, s.row_length, true);
                } else {
                    add_visible<T, true>(problem, tile, block, begin, count, s.weights, gradient_rows, d_values,
                                         s.v_row_length);
                    add_visible<T, true>(problem, tile, block, begin, count, s.d_logits, query_rows, d_keys,
                                         s.row_length);
                }
                const T* const keys = s.keys + begin * s.row_length;
                T* const d_queries = s.d_queries + row * s.row_length;
                if (seen == Sight::all || block.finite[begin / key_tile])
                    small_product<T, 1>(tile.rows, s.row_length, count, s.d_logits, lane_count<T>, keys, s.row_length,
                                        d_queries, s.row_length, true);
                else
                    add_visible<T, false>(problem, tile, block, begin, count, s.d_logits, keys, d_queries,
                                          s.row_length);
            }
        }
        if (!packed) continue;
        for (std::int64_t j = 0; j < block.count; ++j) {
            T* const k_to = d_row(problem.d_k, first + j, problem.size);
            T* const v_to = d_row(problem.d_v, first + j, problem.v_size);
            for (std::int64_t i = 0; i < problem.size; ++i) k_to[i] = s.d_keys[j * s.row_length + i];
            for (std::int64_t i = 0; i < problem.v_size; ++i) v_to[i] = s.d_values[j * s.v_row_length + i];
        }
    }

    for (std::int64_t row = 0; row < rows; ++row) {
        T* const to = d_q_row(row_at(problem, range, row));
        for (std::int64_t i = 0; i < problem.size; ++i) to[i] = s.d_queries[row * s.row_length + i];
    }
}
