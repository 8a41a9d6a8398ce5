// Attention, forward, on one rank: adds some keys to the state of some queries, without a matrix of all logits.
//
//     for each block of keys (packed once):                        4 key tiles of 84 keys
//         for each tile of queries:                                64 rows, in lanes
//             for each key tile that the mask leaves something of:
//                 logits (keys, lanes) = K q^T                     register tiles of 6 keys and 4 vectors (AVX2: 2)
//                 highest, total: vertical maximum and sum of 2^(logit - highest), in registers
//                 output (features, lanes) = output * factor + V^T weights
//                                                                  register tiles of 6 features and 4 vectors
//
// FLOPs: 2 (size + v_size) a visible pair and head. Bytes: K and V are read once per range of queries (at most about
// `forward_rows` rows), q and the state once per call. The state is not normalised, so that a call takes up where
// another one stopped (a ring's next hop) and nothing is rounded between them.
//
// The online softmax is that of Milakov and Gimelshein (2018), in blocks as in FlashAttention (Dao et al., 2022).

template <class T>
struct ForwardScratch {
    std::int64_t rows, tiles;
    T *queries, *output, *highest, *total;         // of the range: (tiles, size, lanes) twice, (tiles, lanes) twice
    T *key_panels, *value_panels;                  // of a block: of its key tiles, one after the other
    T *rows_of_keys, *rows_of_lanes, *transposed;  // on the way to panels and lanes
    T* weights;
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

// From one staged row to the next: a multiple of 8, for they are transposed 8 x 8.
template <class T>
FIVEDP_INLINE std::int64_t staged_length(const AttentionProblem& problem) {
    return round_up(problem.size > problem.v_size ? problem.size : problem.v_size, 8);
}

template <class T>
FIVEDP_INLINE ForwardScratch<T> forward_scratch(const AttentionProblem& problem, std::int64_t rows, char* scratch) {
    ForwardScratch<T> s;
    char* at = scratch;
    const std::int64_t row_length = staged_length<T>(problem);
    s.rows = rows;
    s.tiles = (rows + query_tile - 1) / query_tile;
    s.queries = take<T>(at, s.tiles * problem.size * query_tile);
    s.output = take<T>(at, s.tiles * problem.v_size * query_tile);
    s.highest = take<T>(at, s.tiles * query_tile);
    s.total = take<T>(at, s.tiles * query_tile);
    s.key_panels = take<T>(at, 4 * key_panels_size<T>(problem.size) + slack<T>);
    s.value_panels = take<T>(at, 4 * feature_panels_size<T>(problem.v_size) + slack<T>);
    s.rows_of_keys = take<T>(at, key_tile * row_length + slack<T>);
    s.rows_of_lanes = take<T>(at, query_tile * row_length);
    s.transposed = take<T>(at, problem.size * transposed_width + slack<T>);
    s.weights = take<T>(at, key_tile * query_tile);
    s.tile = take<QueryTile<T>>(at, s.tiles);
    s.block = take<KeyBlock<T>>(at, 1);
    s.bytes = at - scratch;
    return s;
}

// Query rows of a range. Keys are packed once for each range; what the backward keeps of a range should stay in cache.
static constexpr std::int64_t forward_rows = 1152, backward_rows = 576;

template <class T>
FIVEDP_NOINLINE std::int64_t attention_forward_bytes(const AttentionProblem& problem, std::int64_t rows) {
    return forward_scratch<T>(problem, rows, nullptr).bytes;
}

// Rows [first, first + rows) of a range as (size, lanes), scaled; lanes without a row are zero. `staged` is left with
// the rows as they are, `row_length` apart.
template <class T>
FIVEDP_INLINE void to_lanes(const AttentionProblem& problem, ElementType type, const TokenView& view, std::int64_t size,
                            const AttentionRange& range, std::int64_t first, std::int64_t rows, T scale, T* staged,
                            std::int64_t row_length, T* to) {
    for (std::int64_t r = 0; r < rows; ++r) {
        const RowAt at = row_at(problem, range, first + r);
        widen_row_as<T>(
            type,
            view.data + range.batch * view.batch_stride + at.query * view.token_stride + at.head * view.head_stride,
            size, staged + r * row_length, size);
    }
    constexpr std::int64_t width = group_lanes<T>;
    for (std::int64_t lane = 0; lane < query_tile; lane += width) {
        const std::int64_t left = rows - lane;
        transpose_rows<T>(staged + lane * row_length, row_length,
                          left < 0       ? 0
                          : left < width ? left
                                         : width,
                          size, to + lane * size, width, scale);
    }
}

// And back: (size, lanes) to rows, of the type of sums.
template <class T>
FIVEDP_INLINE void from_lanes(const AttentionProblem& problem, const TokenView& view, std::int64_t size,
                              const AttentionRange& range, std::int64_t first, std::int64_t rows, const T* lanes_of,
                              T* staged, std::int64_t row_length) {
    constexpr std::int64_t width = group_lanes<T>;
    for (std::int64_t lane = 0; lane < query_tile; lane += width)
        transpose<T, T>((const char*)(lanes_of + lane * size), width * (std::int64_t)sizeof(T), size, width,
                        staged + lane * row_length, row_length);
    for (std::int64_t r = 0; r < rows; ++r) {
        const RowAt at = row_at(problem, range, first + r);
        T* const to = (T*)(view.data + range.batch * view.batch_stride + at.query * view.token_stride +
                           at.head * view.head_stride);
        for (std::int64_t i = 0; i < size; ++i) to[i] = staged[r * row_length + i];
    }
}

// (batch, queries, heads, size) contiguous, of the type of sums.
template <class T>
FIVEDP_INLINE TokenView sums_view(const AttentionProblem& problem, void* data, std::int64_t size) {
    const std::int64_t head = size * (std::int64_t)sizeof(T), token = problem.heads * head;
    return {(char*)data, problem.n_queries * token, token, head};
}
template <class T>
static constexpr ElementType sums_type = sizeof(T) == 8 ? ElementType::f64 : ElementType::f32;

// The panels of a block's keys and values.
template <class T>
FIVEDP_INLINE void pack_block(const AttentionProblem& problem, const AttentionRange& range, std::int64_t first,
                              std::int64_t row_length, const ForwardScratch<T>& s) {
    for (std::int64_t begin = 0; begin < s.block->count; begin += key_tile) {
        const std::int64_t k = begin / key_tile, left = s.block->count - begin;
        const std::int64_t count = left < key_tile ? left : key_tile;
        panels_of_keys<T>(problem, problem.k, range.batch, range.kv_head, first + begin, count, problem.size,
                          s.transposed, s.key_panels + k * key_panels_size<T>(problem.size));
        stage_rows<T>(problem, problem.v, range.batch, range.kv_head, first + begin, count, problem.v_size,
                      s.rows_of_keys, row_length);
        s.block->finite[k] = !has_nonfinite(s.rows_of_keys, count, problem.v_size, row_length);
        panels_of_features<T>(s.rows_of_keys, row_length, count, problem.v_size,
                              s.value_panels + k * feature_panels_size<T>(problem.v_size));
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

template <class T>
FIVEDP_NOINLINE void attention_forward(const AttentionProblem& problem, const AttentionRange& range, char* scratch) {
    const std::int64_t group = problem.heads / problem.kv_heads;
    const std::int64_t rows = group * (range.query_end - range.query_begin);
    const std::int64_t size = problem.size, v_size = problem.v_size, row_length = staged_length<T>(problem);
    const std::int64_t v_step = feature_step(v_size);
    const ForwardScratch<T> s = forward_scratch<T>(problem, rows, scratch);
    const TokenView state = sums_view<T>(problem, problem.output, v_size);
    T* const all_highest = (T*)problem.highest;
    T* const all_total = (T*)problem.total;
    const auto flat = [&](std::int64_t row) {
        const RowAt at = row_at(problem, range, row);
        return (range.batch * problem.heads + at.head) * problem.n_queries + at.query;
    };

    for (std::int64_t t = 0; t < s.tiles; ++t) {
        const std::int64_t first = t * query_tile, left = rows - first;
        const std::int64_t in_tile = left < query_tile ? left : query_tile;
        describe_tile<T>(problem, range, first, in_tile, s.tile[t]);
        to_lanes<T>(problem, problem.type, problem.q, size, range, first, in_tile, (T)(problem.scale * log2_of_e),
                    s.rows_of_lanes, row_length, s.queries + first * size);
        to_lanes<T>(problem, sums_type<T>, state, v_size, range, first, in_tile, T(1), s.rows_of_lanes, row_length,
                    s.output + first * v_size);
        for (std::int64_t row = first; row < first + query_tile; ++row) {
            s.highest[row] = row < rows ? all_highest[flat(row)] : (T)-__builtin_inf();
            s.total[row] = row < rows ? all_total[flat(row)] : T(0);
        }
    }

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
                    pack_block<T>(problem, range, first, row_length, s);
                    packed = true;
                }
                KeyRange keys = {0, block.count - begin < key_tile ? block.count - begin : key_tile};
                if (seen == Sight::some) keys = seen_keys<T>(problem, tile, block, begin, keys.end);
                lane_product<T>(tile.vectors, s.key_panels + k * key_panels_size<T>(size), panel_rows, size, keys.begin,
                                keys.end, 0, size, s.queries + row * size, 0, size, s.weights, key_tile, End::store,
                                nullptr);
                T factor[query_tile];
                const bool rescale = weigh<T>(problem, tile, block, begin, keys, seen, s.weights, s.highest + row,
                                              s.total + row, factor);
                if (seen == Sight::all || block.finite[k]) {
                    lane_product<T>(tile.vectors, s.value_panels + k * feature_panels_size<T>(v_size), v_step, key_tile,
                                    0, v_size, keys.begin, keys.end - keys.begin, s.weights, keys.begin, key_tile,
                                    output, v_size, rescale ? End::scale_and_add : End::add, factor);
                } else {
                    stage_rows<T>(problem, problem.v, range.batch, range.kv_head, first + begin, keys.end, v_size,
                                  s.rows_of_keys, row_length);
                    add_visible_keys<T>(problem, tile, block, begin, keys, s.weights, s.rows_of_keys, row_length,
                                        v_size, rescale ? factor : nullptr, output);
                }
            }
        }
    }

    for (std::int64_t first = 0; first < rows; first += query_tile) {
        const std::int64_t left = rows - first;
        from_lanes<T>(problem, state, v_size, range, first, left < query_tile ? left : query_tile,
                      s.output + first * v_size, s.rows_of_lanes, row_length);
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        all_highest[flat(row)] = s.highest[row];
        all_total[flat(row)] = s.total[row];
    }
}
