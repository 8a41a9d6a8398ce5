// Partial sums over aligned spans of virtual shards, joined in the tree that one product over all shards would use.
// One pass over memory: a short run of columns of every partial is folded through a small stack in the L1 cache.

// Elements of a run: 8 open runs of 2 KB stay in the L1 cache.
static constexpr std::int64_t run_bytes = 2048;

template <class T>
FIVEDP_INLINE void load_run(const char* from, std::int64_t stride, std::int64_t n, T* to) {
    if (stride == (std::int64_t)sizeof(T)) {
        __builtin_memcpy(to, from, n * sizeof(T));
    } else {
        for (std::int64_t j = 0; j < n; ++j) to[j] = element<T, T>(from + j * stride);
    }
}

template <class T>
FIVEDP_NOINLINE void tree_sum_rows(const TreeSumProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    constexpr std::int64_t run = run_bytes / sizeof(T);
    alignas(64) T stack[max_tree_depth][run];
    std::int64_t leaves[max_tree_depth];
    const ArrayView& out = problem.out;
    for (std::int64_t flat_row = row_begin; flat_row < row_end; ++flat_row) {
        const std::int64_t batch = flat_row / out.rows, row = flat_row % out.rows;
        for (std::int64_t column = 0; column < out.cols; column += run) {
            const std::int64_t n = out.cols - column < run ? out.cols - column : run;
            int depth = 0;
            for (std::int64_t p = 0; p < problem.n_partials; ++p) {
                const ArrayView& partial = problem.partials[p];
                load_run<T>(partial.data + batch * partial.batch_stride + row * partial.row_stride +
                                column * partial.col_stride,
                            partial.col_stride, n, stack[depth]);
                leaves[depth++] = problem.leaves[p];
                const bool last = p + 1 == problem.n_partials;
                for (; depth > 1 && (last || leaves[depth - 2] == leaves[depth - 1]); --depth) {
                    T* __restrict__ left = stack[depth - 2];
                    const T* __restrict__ right = stack[depth - 1];
                    for (std::int64_t j = 0; j < n; ++j) left[j] = left[j] + right[j];
                    leaves[depth - 2] += leaves[depth - 1];
                }
            }
            finish_row_as<T>(out.type, stack[0],
                             out.data + batch * out.batch_stride + row * out.row_stride + column * out.col_stride,
                             out.col_stride, n, problem.alpha, problem.beta);
        }
    }
}

static void tree_sum(const TreeSumProblem& problem, std::int64_t row_begin, std::int64_t row_end) {
    if (problem.partials[0].type == ElementType::f64) {
        tree_sum_rows<double>(problem, row_begin, row_end);
    } else {
        tree_sum_rows<float>(problem, row_begin, row_end);
    }
}
